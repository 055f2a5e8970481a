"""lm-evaluation-harness, local-completions, on a few items of our own.  Prints what run.py compares with transformers."""

import json
import os
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

CHOICE = [
    ("The capital of France is", [" Paris", " London", " blue"], 0),
    ("Two plus two is", [" seven", " four", " purple"], 1),
    ("Water freezes at zero degrees", [" Celsius", " Monday", " apple"], 0),
    ("The opposite of hot is", [" tall", " cold", " seven"], 1),
    ("A dog says", [" meow", " moo", " woof"], 2),
    ("The sun rises in the", [" east", " fridge", " number"], 0),
]
SAY = ["The capital of France is", "One, two, three, four,", "The days of the week are"]
HEAD = (
    "task: {0}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {1}\ntest_split: test\ndoc_to_text: '{{{{q}}}}'\n"
)
folder = Path.cwd()
(folder / "choice.json").write_text("\n".join(json.dumps({"q": q, "c": c, "a": a}) for q, c, a in CHOICE))
(folder / "say.json").write_text("\n".join(json.dumps({"q": q, "a": "x"}) for q in SAY))
(folder / "choice.yaml").write_text(
    HEAD.format("our_choice", folder / "choice.json")
    + "output_type: multiple_choice\ntarget_delimiter: ''\ndoc_to_choice: '{{c}}'\ndoc_to_target: a\n"
    + "metric_list:\n  - metric: acc\n"
)
(folder / "say.yaml").write_text(
    HEAD.format("our_say", folder / "say.json")
    + "output_type: generate_until\ndoc_to_target: a\ngeneration_kwargs:\n  until: ['\\n\\n', ' Saturday']\n"
    + "  max_gen_toks: 24\n  do_sample: false\n  temperature: 0\nmetric_list:\n  - metric: exact_match\n"
)
settings = {
    "model": "SmolLM2-135M-Instruct",
    "base_url": os.environ["MINISGL_URL"] + "/v1/completions",
    "tokenizer": os.environ["MINISGL_TOKENIZER"],
    "max_length": 2048,
}
results = lm_eval.simple_evaluate(
    model="local-completions",
    model_args=settings,
    tasks=["our_choice", "our_say"],
    task_manager=TaskManager(include_path=str(folder)),
    log_samples=True,
)
assert results["results"]["our_choice"]["acc,none"] >= 0.8, results["results"]


def arguments(sample):
    """The (context, continuation or settings) pairs of a sample, whatever the version calls them."""
    kept = sample["arguments"]
    return [tuple(x.values()) if isinstance(x, dict) else tuple(x) for x in (kept.values() if isinstance(kept, dict) else kept)]


def answers(sample):
    return [r[0] if isinstance(r, list) else r for r in sample["resps"]]


likelihoods = []
for s in results["samples"]["our_choice"]:
    for (context, continuation, *_), (logprob, is_greedy, *_) in zip(arguments(s), answers(s), strict=True):
        likelihoods.append((context, continuation, float(logprob), str(is_greedy) == "True"))
generated = [(arguments(s)[0][0], arguments(s)[0][1]["until"], answers(s)[0]) for s in results["samples"]["our_say"]]
print(json.dumps({"loglikelihood": likelihoods, "generate": generated}))

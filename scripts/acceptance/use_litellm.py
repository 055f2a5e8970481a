"""litellm as a library: chat whole and streamed, completions, its mapping of errors."""

import os

import litellm

to = {"model": "openai/SmolLM2-135M-Instruct", "api_base": os.environ["MINISGL_URL"] + "/v1", "api_key": "none"}
ask = [{"role": "user", "content": "What is the capital of France?"}]
answer = litellm.completion(**to, messages=ask, temperature=0)
assert "Paris" in answer.choices[0].message.content
parts = litellm.completion(**to, messages=ask, temperature=0, stream=True, stream_options={"include_usage": True})
assert "Paris" in "".join(p.choices[0].delta.content or "" for p in parts if p.choices)
text = litellm.text_completion(
    **{**to, "model": "text-completion-openai/SmolLM2-135M-Instruct"}, prompt="One, two,", max_tokens=4
)
assert text.choices[0].text
try:
    litellm.completion(**to, messages=[{"role": "user", "content": "word " * 20_000}])
except litellm.ContextWindowExceededError:
    pass
else:
    raise AssertionError("a prompt of 20,000 words was not refused")
print("chat, stream, text completion, ContextWindowExceededError")

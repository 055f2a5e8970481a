"""The openai SDK: models, chat and completions, streamed and whole, errors."""

import os

import openai

client = openai.OpenAI(base_url=os.environ["MINISGL_URL"] + "/v1", api_key="none")
model = client.models.list().data[0].id
assert client.models.retrieve(model).id == model
ask = {"model": model, "messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
answer = client.chat.completions.create(**ask)
text = answer.choices[0].message.content
assert "Paris" in text, text
parts, usage = [], None
for chunk in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
    parts += [c.delta.content or "" for c in chunk.choices]
    usage = chunk.usage or usage
assert "".join(parts) == text
assert usage == answer.usage or usage.completion_tokens == answer.usage.completion_tokens
several = client.chat.completions.create(**{**ask, "temperature": 1}, n=3, seed=7, max_tokens=8, logprobs=True, top_logprobs=2)
assert [c.index for c in several.choices] == [0, 1, 2]
assert all(len(c.logprobs.content) <= 8 and len(c.logprobs.content[0].top_logprobs) == 2 for c in several.choices)
done = client.completions.create(model=model, prompt="One, two, three,", max_tokens=6, temperature=0)
told = "".join(
    c.choices[0].text
    for c in client.completions.create(model=model, prompt="One, two, three,", max_tokens=6, temperature=0, stream=True)
)
assert told == done.choices[0].text
for bad, kind in (({"temperature": -1}, openai.BadRequestError), ({"model": "gpt-none"}, openai.NotFoundError)):
    try:
        client.chat.completions.create(**{**ask, **bad})
    except kind:
        continue
    raise AssertionError(bad)
print("chat, completions, models, streams, n, logprobs, errors")

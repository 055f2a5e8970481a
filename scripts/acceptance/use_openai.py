"""The openai SDK: chat, completions, embeddings, responses, forms, tools, files and batches; streams and errors."""

import json
import os
import time
from typing import Literal

import openai
from pydantic import BaseModel, Field

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


class City(BaseModel):
    name: str = Field(max_length=20)
    country: Literal["France", "Italy"]


# ---------------- embeddings (the SDK asks for base64)
one, other = (d.embedding for d in client.embeddings.create(model=model, input=["a cat", "a kitten"]).data)
assert abs(sum(x * x for x in one) - 1) < 1e-4
assert sum(a * b for a, b in zip(one, other, strict=True)) > 0.5

# ---------------- forms
messages = [{"role": "user", "content": "Describe the capital of France as JSON."}]
parsed = client.chat.completions.parse(model=model, messages=messages, temperature=0, response_format=City)
assert isinstance(parsed.choices[0].message.parsed, City), parsed
with client.chat.completions.stream(model=model, messages=messages, temperature=0, response_format=City) as stream:
    assert stream.get_final_completion().choices[0].message.parsed == parsed.choices[0].message.parsed
answer = client.responses.parse(model=model, input=messages[0]["content"], temperature=0, text_format=City)
assert isinstance(answer.output_parsed, City), answer

# ---------------- tools
tool = openai.pydantic_function_tool(City, name="show_city")
required = {"model": model, "temperature": 0, "tools": [tool], "tool_choice": "required"}
with client.chat.completions.stream(messages=messages, **required) as stream:
    kinds = {event.type for event in stream}
    call = stream.get_final_completion().choices[0].message.tool_calls[0]
assert "tool_calls.function.arguments.delta" in kinds, kinds
assert isinstance(call.function.parsed_arguments, City)
with client.responses.stream(input=messages[0]["content"], **required) as stream:
    assert any(event.type == "response.function_call_arguments.delta" for event in stream)
    assert isinstance(stream.get_final_response().output[0].parsed_arguments, City)
told = {"role": "tool", "tool_call_id": call.id, "content": "shown"}
done = client.chat.completions.create(
    model=model,
    messages=[*messages, {"role": "assistant", "content": "", "tool_calls": [call.model_dump(exclude_none=True)]}, told],
    max_tokens=5,
)
assert done.choices[0].finish_reason in {"stop", "length"}

# ---------------- files and batches
lines = [
    {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": {"prompt": f"{i}, ", "max_tokens": 4}}
    for i in range(5)
]
file = client.files.create(file=("in.jsonl", "\n".join(map(json.dumps, lines)).encode()), purpose="batch")
batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
while batch.status not in {"completed", "failed"}:
    time.sleep(0.2)
    batch = client.batches.retrieve(batch.id)
assert (batch.status, batch.request_counts.completed) == ("completed", 5), batch
out = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
assert sorted(line["custom_id"] for line in out) == list("01234")
assert all(line["response"]["body"]["choices"][0]["text"] for line in out)
print("chat, completions, models, streams, n, logprobs, errors, embeddings, forms, tools, responses, files, batches")

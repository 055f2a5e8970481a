"""The anthropic SDK: messages, streams, models, errors, tools, and its tool runner, which wants a thread first."""

import os

import anthropic
from anthropic import beta_tool

client = anthropic.Anthropic(base_url=os.environ["MINISGL_URL"], api_key="none", max_retries=0)
model = client.models.list().data[0].id
assert client.models.retrieve(model).display_name == model
ask = {"model": model, "max_tokens": 40, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
greedy = {"extra_body": {"temperature": 0}}
answer = client.messages.create(**ask, **greedy)
assert "Paris" in answer.content[0].text, answer
with client.messages.stream(**ask, **greedy) as stream:
    assert stream.get_final_message().content[0].text == answer.content[0].text
n = client.messages.count_tokens(model=model, messages=ask["messages"]).input_tokens
assert n == answer.usage.input_tokens + answer.usage.cache_read_input_tokens
begun = [*ask["messages"], {"role": "assistant", "content": "The capital of France is"}]
assert client.messages.create(**{**ask, "messages": begun}, **greedy).content[0].text.lstrip().startswith("Paris")
for bad, kind in (({"max_tokens": 0}, anthropic.BadRequestError), ({"model": "claude"}, anthropic.NotFoundError)):
    try:
        client.messages.create(**{**ask, **bad})
    except kind as e:
        assert e.body["error"]["message"]  # noqa: PT017
        continue
    raise AssertionError(bad)

# ---------------- tools: the first turn must call, the whole conversation comes back with the result
seen: list[str] = []


@beta_tool
def get_weather(city: str) -> str:
    """The weather in a city.

    Args:
        city: The name of the city.
    """
    seen.append(city)
    return f"It rains in {city}."


lengths = []
runner = client.beta.messages.tool_runner(
    model=model,
    max_tokens=80,
    tools=[get_weather],
    tool_choice={"type": "tool", "name": "get_weather"},
    messages=[{"role": "user", "content": "What is the weather in Paris?"}],
    max_iterations=3,
    **greedy,
)
for message in runner:
    assert message.stop_reason == "tool_use", message
    lengths.append(message.usage.input_tokens + message.usage.cache_read_input_tokens)
assert len(seen) == len(lengths) == 3, (seen, lengths)
assert lengths == sorted(set(lengths)), f"the history does not grow: {lengths}"
try:
    client.beta.messages.create(**ask, thread={"type": "create"})
except anthropic.BadRequestError as e:
    assert e.body["error"]["details"]["error_code"] == "thread_unsupported_request"  # noqa: PT017
else:
    raise AssertionError("a thread was taken")
print(f"messages, streams, models, {len(lengths)} turns of the tool runner with prompts of {lengths} tokens")

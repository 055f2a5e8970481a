"""langchain-openai: ChatOpenAI, whole and streamed, with usage."""

import os

from langchain_openai import ChatOpenAI, OpenAI

url = os.environ["MINISGL_URL"] + "/v1"
chat = ChatOpenAI(base_url=url, api_key="none", model="SmolLM2-135M-Instruct", temperature=0, max_tokens=24, stream_usage=True)
answer = chat.invoke("What is the capital of France?")
assert "Paris" in answer.content, answer
assert answer.usage_metadata["output_tokens"] > 0
parts = list(chat.stream("What is the capital of France?"))
assert "Paris" in "".join(p.content for p in parts)
assert any(p.usage_metadata for p in parts)
assert len(chat.batch(["Say one.", "Say two."])) == 2
assert OpenAI(base_url=url, api_key="none", model="SmolLM2-135M-Instruct", temperature=0, max_tokens=4).invoke("One, two,")
refused = ""
try:
    chat.invoke("word " * 20_000)
except Exception as e:
    refused = f"{type(e).__name__}: {e}"
assert "context_length_exceeded" in refused, refused
print("invoke, stream with usage, batch, completions, overflow recognised")

"""Anthropic's SDK for JavaScript: messages, streams, models, and its tool runner, which wants a thread first."""

import os
import subprocess
from pathlib import Path

SCRIPT = """
import Anthropic from "@anthropic-ai/sdk";
import assert from "node:assert";
const client = new Anthropic({baseURL: process.env.MINISGL_URL, apiKey: "none", maxRetries: 0});
const model = (await client.models.list()).data[0].id;
const ask = {model, max_tokens: 40, temperature: 0, messages: [{role: "user", content: "What is the capital of France?"}]};
const answer = await client.messages.create(ask);
assert(answer.content[0].text.includes("Paris"), JSON.stringify(answer));
const told = await client.messages.stream(ask).finalMessage();
assert.strictEqual(told.content[0].text, answer.content[0].text);
const seen = [];
const tool = {
  type: "custom", name: "get_weather", description: "The weather in a city.",
  input_schema: {type: "object", properties: {city: {type: "string"}}, required: ["city"]},
  parse: x => x, run: ({city}) => { seen.push(city); return `It rains in ${city}.`; },
};
const runner = client.beta.messages.toolRunner({
  model, max_tokens: 80, temperature: 0, tools: [tool], tool_choice: {type: "tool", name: "get_weather"},
  messages: [{role: "user", content: "What is the weather in Paris?"}], max_iterations: 3,
});
const lengths = [];
for await (const message of runner) {
  lengths.push(message.usage.input_tokens + message.usage.cache_read_input_tokens);
}
assert.strictEqual(seen.length, 3);
assert(lengths[0] < lengths[1] && lengths[1] < lengths[2], `the history does not grow: ${lengths}`);
console.log(`messages, streams, models, ${lengths.length} turns of the tool runner with prompts of ${lengths} tokens`);
"""
Path("main.mjs").write_text(SCRIPT)
Path("node_modules").symlink_to(os.environ["MINISGL_NODE_MODULES"])
subprocess.run(["node", "main.mjs"], check=True)

// Anthropic's own library for JavaScript: node anthropic.mjs URL MODEL
import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";

const [url, model] = process.argv.slice(2);
const client = new Anthropic({ baseURL: url, apiKey: "unused", maxRetries: 0 });
const messages = [{ role: "user", content: "Hi" }];
const input_schema = { type: "object", properties: { city: { type: "string" } }, required: ["city"], additionalProperties: false };
const tools = [{ name: "get_weather", description: "The weather", input_schema }];
const weather = [{ role: "user", content: "What is the weather in Köln?" }];

const message = await client.messages.create({ model, max_tokens: 100, messages });
assert.equal(message.content[0].text, "You said: Hi");
assert.equal(message.stop_reason, "end_turn");

let told = "";
const texts = client.messages.stream({ model, max_tokens: 100, messages }).on("text", (text) => (told += text));
assert.equal((await texts.finalMessage()).content[0].text, "You said: Hi");
assert.equal(told, "You said: Hi");

for (const type of ["auto", "any"]) {
  const called = await client.messages.stream({ model, max_tokens: 200, messages: weather, tools, tool_choice: { type } }).finalMessage();
  assert.deepEqual(called.content[0].input, { city: "Köln" });
  assert.equal(called.stop_reason, "tool_use");
  const result = { type: "tool_result", tool_use_id: called.content[0].id, content: "sunny" };
  const turns = [...weather, { role: "assistant", content: called.content }, { role: "user", content: [result] }];
  const reply = await client.messages.create({ model, max_tokens: 100, messages: turns, tools });
  assert.equal(reply.content[0].text, "It is sunny.");
}

const { input_tokens } = await client.messages.countTokens({ model, messages });
assert.ok(input_tokens > 0);
const names = [];
for await (const entry of client.models.list()) names.push(entry.id);
assert.deepEqual(names, [model]);

const other = { model: "claude-opus-4-5", max_tokens: 9, messages };
await assert.rejects(client.messages.create(other), Anthropic.NotFoundError);
await assert.rejects(client.messages.create({ model, messages }), Anthropic.BadRequestError);

const story = [{ role: "user", content: "Tell a long story." }];
const stream = client.messages.stream({ model, max_tokens: 3000, messages: story });
for await (const event of stream) if (event.type === "content_block_delta") break;
console.log("ok");

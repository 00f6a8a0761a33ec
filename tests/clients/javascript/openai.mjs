// OpenAI's own library for JavaScript: node openai.mjs URL MODEL
import assert from "node:assert/strict";
import OpenAI from "openai";

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0 });
const messages = [{ role: "user", content: "Hi" }];
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"], additionalProperties: false };
const tools = [{ type: "function", function: { name: "get_weather", parameters } }];
const weather = [{ role: "user", content: "What is the weather in Köln?" }];

const answer = await client.chat.completions.create({ model, messages });
assert.equal(answer.choices[0].message.content, "You said: Hi");

let told = "";
for await (const chunk of await client.chat.completions.create({ model, messages, stream: true })) {
  told += chunk.choices[0].delta.content ?? "";
}
assert.equal(told, "You said: Hi");

for (const tool_choice of ["auto", "required"]) {
  const called = await client.chat.completions.stream({ model, messages: weather, tools, tool_choice }).finalMessage();
  assert.deepEqual(JSON.parse(called.tool_calls[0].function.arguments), { city: "Köln" });
  const result = { role: "tool", tool_call_id: called.tool_calls[0].id, content: "sunny" };
  const reply = await client.chat.completions.create({ model, messages: [...weather, called, result], tools });
  assert.equal(reply.choices[0].message.content, "It is sunny.");
}

const schema = {
  type: "object",
  properties: { name: { type: "string" }, population: { type: "integer" } },
  required: ["name", "population"],
  additionalProperties: false,
};
const form = await client.chat.completions.create({
  model,
  messages: [{ role: "user", content: "Describe a city in JSON." }],
  response_format: { type: "json_schema", json_schema: { name: "city", schema } },
});
assert.deepEqual(JSON.parse(form.choices[0].message.content), { name: "Köln", population: 1087353 });

const names = [];
for await (const entry of client.models.list()) names.push(entry.id);
assert.deepEqual(names, [model]);

await assert.rejects(client.chat.completions.create({ model: "gpt-4", messages }), OpenAI.NotFoundError);
await assert.rejects(client.chat.completions.create({ model, messages, temperature: 3 }), OpenAI.BadRequestError);

const story = [{ role: "user", content: "Tell a long story." }];
const stream = await client.chat.completions.create({ model, messages: story, stream: true });
for await (const _ of stream) break; // leaving the loop closes the connection
console.log("ok");

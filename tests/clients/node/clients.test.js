// The official Node client and Vercel's AI SDK against the server whose address is in SERVER_URL.
import assert from "node:assert/strict";
import { test } from "node:test";

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const baseURL = `${process.env.SERVER_URL}/v1`;
const client = new OpenAI({ baseURL, apiKey: "key", maxRetries: 0 });
const model = createOpenAICompatible({ name: "easel", baseURL, apiKey: "key", includeUsage: true })("easel-demo");
const ask = [{ role: "user", content: "Weather in Paris?" }];
const weather = {
  type: "function",
  function: {
    name: "get_weather",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
};
const Weather = z.object({ city: z.string(), degrees: z.number().int() });
const tools = {
  get_weather: tool({
    description: "Weather of a city.",
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => `${city}: sunny`,
  }),
};

async function engine() {
  return (await fetch(`${process.env.SERVER_URL}/engine`)).json();
}

test("openai: a chat and a stream", async () => {
  const answer = await client.chat.completions.create({ model: "easel-demo", messages: ask });
  assert.equal(answer.choices[0].message.content, "It is sunny.");
  const final = await client.chat.completions.stream({ model: "easel-demo", messages: ask }).finalChatCompletion();
  assert.equal(final.choices[0].message.content, "It is sunny.");
});

test("openai: a tool loop to the end, run by the client", async () => {
  const runner = client.chat.completions.runTools({
    model: "easel-demo",
    messages: ask,
    stream: true,
    tools: [{ ...weather, function: { ...weather.function, parse: JSON.parse, function: ({ city }) => `${city}: sunny` } }],
  });
  assert.equal(await runner.finalContent(), "It is sunny.");
});

test("openai: responses", async () => {
  const answer = await client.responses.create({ model: "easel-demo", input: "think" });
  assert.equal(answer.output_text, "It is sunny.");
  const stream = client.responses.stream({
    model: "easel-demo",
    input: "Weather in Paris?",
    tools: [{ type: "function", strict: false, ...weather.function }],
  });
  const final = await stream.finalResponse();
  assert.deepEqual(final.output.map((item) => item.type), ["message", "function_call"]);
  assert.equal(final.output[1].arguments, '{"city": "Paris"}');
});

test("openai: a parsed object, in chat and in responses", async () => {
  const chat = await client.chat.completions.parse({
    model: "easel-demo",
    messages: ask,
    response_format: zodResponseFormat(Weather, "weather"),
  });
  assert.deepEqual(chat.choices[0].message.parsed, { city: "Paris", degrees: 21 });
  const response = await client.responses.parse({
    model: "easel-demo",
    input: "Weather in Paris?",
    text: { format: zodTextFormat(Weather, "weather") },
  });
  assert.deepEqual(response.output_parsed, { city: "Paris", degrees: 21 });
});

test("openai: logprobs", async () => {
  const answer = await client.chat.completions.create({ model: "easel-demo", messages: ask, logprobs: true });
  assert.equal(answer.choices[0].logprobs.content.map((each) => each.token).join(""), "It is sunny.");
});

test("openai: errors", async () => {
  const long = [{ role: "user", content: "x".repeat(30_000) }];
  await assert.rejects(client.chat.completions.create({ model: "easel-demo", messages: long }), {
    name: "Error",
    status: 400,
    code: "context_length_exceeded",
  });
});

test("openai: leaving a stream stops the work", async () => {
  const slow = [{ role: "user", content: "slow" }];
  const stream = await client.chat.completions.create({ model: "easel-demo", messages: slow, stream: true });
  for await (const _ of stream) break; // leaving the loop aborts the request
  for (let tries = 0; ; tries++) {
    const { begun, ended } = await engine();
    if (begun === ended) break;
    assert.ok(tries < 100, "the engine still works for a client that left");
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
});

test("ai: text, usage and thought", async () => {
  const { text, reasoningText, usage, finishReason } = await generateText({ model, prompt: "think", maxRetries: 0 });
  assert.deepEqual([text, reasoningText, finishReason], ["It is sunny.", "hmm", "stop"]);
  assert.ok(usage.outputTokens > 5);
});

test("ai: a streamed tool loop to the end", async () => {
  const result = streamText({ model, messages: ask, tools, stopWhen: stepCountIs(3), maxRetries: 0 });
  const kinds = new Set();
  for await (const part of result.fullStream) {
    assert.notEqual(part.type, "error", JSON.stringify(part.error));
    kinds.add(part.type);
  }
  assert.ok(kinds.has("tool-call") && kinds.has("tool-result"));
  assert.equal(await result.text, "It is sunny.");
  assert.equal(await result.finishReason, "stop");
});

test("ai: an object", async () => {
  const exact = createOpenAICompatible({ name: "easel", baseURL, apiKey: "key", supportsStructuredOutputs: true });
  const { object } = await generateObject({ model: exact("easel-demo"), schema: Weather, messages: ask, maxRetries: 0 });
  assert.deepEqual(object, { city: "Paris", degrees: 21 });
});

test("ai: errors", async () => {
  await assert.rejects(generateText({ model, prompt: "x".repeat(30_000), maxRetries: 0 }), /maximum context length/);
});

// A conversation's turns: ask, stop, retry, edit. Invariant: what is on the screen is what is kept and sent next time.
import { signal } from "@preact/signals";
import * as api from "./api.js";
import { addDraft, forgetDrafts, keepDrafts } from "./drafts.js";
import { apiKey, begin, change, changeMessage, conversation, newId, settings } from "./store.js";

export const running = signal(null); // { conversation, message, stop }
export const model = signal(null);
export const seesImages = signal(false); // the model does
export const fault = signal(null); // "away" | "key" | null

export async function connect() {
  try {
    const [card] = await api.models();
    model.value = card.id;
    seesImages.value = card.input_modalities.includes("image");
    fault.value = null;
  } catch (error) {
    fault.value = error.status === 401 ? "key" : "away";
    if (fault.value === "away") setTimeout(connect, 1500);
  }
}

export function send(text, images = []) {
  const talk = conversation() ?? begin();
  const title = talk.title || text.trim().slice(0, 60) || "Image";
  const message = { id: newId(), role: "user", content: text, ...(images.length ? { images } : {}) };
  change(talk.id, { title, messages: [...talk.messages, message] });
  return answer(talk.id);
}

export function giveResult(callId, text) {
  const talk = conversation();
  change(talk.id, { messages: [...talk.messages, { id: newId(), role: "tool", tool_call_id: callId, content: text }] });
  const calls = talk.messages.flatMap((each) => each.calls ?? []).map((each) => each.id);
  const given = conversation().messages.map((each) => each.tool_call_id);
  return calls.every((id) => given.includes(id)) ? answer(talk.id) : undefined;
}

// Everything behind a message goes; the message itself with it, unless it is to be answered again.
function cut(talk, index) {
  forgetDrafts(talk.messages.slice(index).map((each) => each.id));
  change(talk.id, { messages: talk.messages.slice(0, index) });
}

export function retry(messageId) {
  const talk = conversation();
  const index = talk.messages.findIndex((each) => each.id === messageId);
  cut(talk, talk.messages[index].role === "assistant" ? index : index + 1);
  return answer(talk.id);
}

export function edit(messageId, text) {
  const talk = conversation();
  const index = talk.messages.findIndex((each) => each.id === messageId);
  cut(talk, index);
  return send(text, talk.messages[index].images);
}

function wire(each) {
  if (each.role === "tool") return { role: "tool", tool_call_id: each.tool_call_id, content: each.content };
  if (each.images) {
    const parts = each.images.map((url) => ({ type: "image_url", image_url: { url } }));
    return { role: each.role, content: each.content ? [...parts, { type: "text", text: each.content }] : parts };
  }
  if (each.role !== "assistant") return { role: each.role, content: each.content };
  const calls = each.calls?.map(({ id, name, arguments: given }) => ({ id, type: "function", function: { name, arguments: given } }));
  return { role: "assistant", content: each.content, ...(calls?.length ? { tool_calls: calls } : {}) };
}

function body(talk) {
  const { preset, temperature, maxTokens, thinking, tools, watch } = settings.value;
  const system = talk.system ? [{ role: "system", content: talk.system }] : [];
  const said = talk.messages.filter((each) => each.role !== "assistant" || each.content || each.calls?.length);
  return {
    model: model.value ?? undefined,
    messages: [...system, ...said.map(wire)],
    easel: { preset, drafts: watch },
    chat_template_kwargs: { enable_thinking: thinking },
    ...(temperature === "" ? {} : { temperature: Number(temperature) }),
    ...(maxTokens === "" ? {} : { max_tokens: Number(maxTokens) }),
    ...(tools.trim() ? { tools: JSON.parse(tools) } : {}),
  };
}

async function answer(id) {
  const control = new AbortController();
  const asked = body(conversation(id));
  const message = { id: newId(), role: "assistant", content: "", reasoning: "", calls: [] };
  change(id, { messages: [...conversation(id).messages, message] });
  running.value = { conversation: id, message: message.id, stop: () => control.abort() };
  const became = (fields) => changeMessage(id, message.id, Object.assign(message, fields));
  try {
    for await (const chunk of api.reply(asked, control.signal)) {
      if (chunk.draft) addDraft(message.id, chunk.draft);
      if (chunk.easel) became({ facts: chunk.easel });
      for (const { delta, finish_reason } of chunk.choices) {
        const fields = {};
        if (delta.content) fields.content = message.content + delta.content;
        if (delta.reasoning_content) fields.reasoning = message.reasoning + delta.reasoning_content;
        if (delta.tool_calls) fields.calls = [...message.calls, ...delta.tool_calls.map((call) => ({ id: call.id, ...call.function }))];
        if (finish_reason) fields.finish = finish_reason;
        if (Object.keys(fields).length) became(fields);
      }
    }
    fault.value = null;
  } catch (error) {
    if (error.name === "AbortError") became({ stopped: true });
    else became({ error: error.message });
    if (error.status === 401) fault.value = "key";
    if (error.status === 0) {
      fault.value = "away";
      connect();
    }
  } finally {
    running.value = null;
    keepDrafts(message.id);
  }
}

export const needsKey = () => fault.value === "key" || apiKey.value !== "";

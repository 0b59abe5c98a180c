// The wire: the same routes and bodies that every other client uses.
import { apiKey } from "./store.js";

export class ApiFault extends Error {
  // status 0: nobody answered
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

const AWAY = "The server does not answer. It may have been stopped.";

async function ask(path, options = {}) {
  const headers = { Accept: "application/json", ...options.headers };
  if (apiKey.value) headers.Authorization = `Bearer ${apiKey.value}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiFault(AWAY, 0);
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => ({}));
  throw new ApiFault(body.error?.message ?? `The server answered with status ${answer.status}.`, answer.status);
}

export const models = async () => (await (await ask("/v1/models")).json()).data;
export const stats = async () => (await ask("/stats")).json();
export const alive = async () => Boolean(await ask("/health"));

// Yields the objects of a streamed reply, drafts among them, until the server says it is done.
export async function* reply(body, signal) {
  const answer = await ask("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ApiFault(chunk.error.message, 200);
        yield chunk;
      }
    }
  } catch (error) {
    if (error instanceof ApiFault || error.name === "AbortError") throw error;
    throw new ApiFault("The connection broke while the reply was coming.", 0);
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new ApiFault("The connection ended before the reply did.", 0);
}

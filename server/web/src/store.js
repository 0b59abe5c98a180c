// What is kept in the browser: conversations and settings in localStorage, the key until the tab closes.
import { effect, signal } from "@preact/signals";

const PREFIX = "easel.";

function kept(name, initial, storage = localStorage) {
  let first = initial;
  try {
    const text = storage.getItem(PREFIX + name);
    if (text !== null) first = JSON.parse(text);
  } catch {
    // what cannot be read is as good as absent
  }
  const value = signal(first);
  // Another tab may have talked meanwhile: without this the last one to write would undo what the other said.
  addEventListener("storage", ({ key, newValue, storageArea }) => {
    if (storageArea === storage && key === PREFIX + name && newValue !== null) value.value = JSON.parse(newValue);
  });
  effect(() => {
    try {
      storage.setItem(PREFIX + name, JSON.stringify(value.value));
      full.value = false;
    } catch {
      full.value = true;
    }
  });
  return value;
}

export const full = signal(false); // the browser has no room left
export const DEFAULTS = { preset: "balanced", temperature: "", maxTokens: "", thinking: false, tools: "", watch: true, theme: "auto" };
export const conversations = kept("conversations", []);
export const current = kept("current", null);
export const settings = kept("settings", DEFAULTS);
export const apiKey = kept("key", "", sessionStorage);

export const newId = () => crypto.getRandomValues(new Uint32Array(3)).join("-");

export function conversation(id = current.value) {
  return conversations.value.find((each) => each.id === id);
}

export function begin() {
  const made = { id: newId(), title: "", system: "", messages: [] };
  conversations.value = [made, ...conversations.value.filter((each) => each.messages.length)];
  current.value = made.id;
  return made;
}

export function change(id, fields) {
  conversations.value = conversations.value.map((each) => (each.id === id ? { ...each, ...fields } : each));
}

export function changeMessage(id, messageId, fields) {
  const messages = conversation(id)?.messages.map((each) => (each.id === messageId ? { ...each, ...fields } : each));
  if (messages) change(id, { messages });
}

export function remove(id) {
  conversations.value = conversations.value.filter((each) => each.id !== id);
  if (current.value === id) current.value = conversations.value[0]?.id ?? null;
}

effect(() => {
  document.documentElement.dataset.theme = settings.value.theme;
});

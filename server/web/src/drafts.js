// The steps of each reply: those of this visit in memory, all of them in the browser's database, for the slider.
import { signal } from "@preact/signals";

const STORE = "drafts";
const steps = new Map(); // message id -> signal of drafts

const opened = new Promise((resolve) => {
  const asked = indexedDB.open("easel", 1);
  asked.onupgradeneeded = () => asked.result.createObjectStore(STORE);
  asked.onsuccess = () => resolve(asked.result);
  asked.onerror = () => resolve(null); // a private window: replay works until the page is left
});

async function store(mode, act) {
  const database = await opened;
  if (database === null) return undefined;
  return new Promise((resolve) => {
    const asked = act(database.transaction(STORE, mode).objectStore(STORE));
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => resolve(undefined);
  });
}

export function draftsOf(id) {
  if (!steps.has(id)) {
    const found = signal([]);
    steps.set(id, found);
    store("readonly", (table) => table.get(id)).then((kept) => {
      if (kept && !found.value.length) found.value = kept;
    });
  }
  return steps.get(id);
}

// A fast model takes more steps than the screen has frames: those of a frame are shown together.
const coming = new Map(); // message id -> drafts since the last frame

function show(id) {
  const drafts = coming.get(id) ?? [];
  coming.delete(id);
  if (drafts.length) draftsOf(id).value = [...draftsOf(id).value, ...drafts];
}

export function addDraft(id, draft) {
  if (coming.has(id)) {
    coming.get(id).push(draft);
    return;
  }
  coming.set(id, [draft]);
  requestAnimationFrame(() => show(id));
}

export function keepDrafts(id) {
  show(id);
  store("readwrite", (table) => table.put(draftsOf(id).value, id));
}

export function forgetDrafts(ids) {
  for (const id of ids) {
    steps.delete(id);
    store("readwrite", (table) => table.delete(id));
  }
}

// Conversations in IndexedDB, one record each. Where a browser refuses it (some private windows),
// they live in memory and `persistent` is false, which the page says.

const STORE = "conversations";

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

export async function openStore() {
  let database;
  try {
    const opening = indexedDB.open("marlin", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore(STORE, { keyPath: "id" });
    database = await done(opening);
  } catch {
    const kept = new Map();
    return {
      persistent: false,
      all: async () => [...kept.values()],
      get: async (id) => kept.get(id),
      put: async (conversation) => void kept.set(conversation.id, structuredClone(conversation)),
      remove: async (id) => void kept.delete(id),
    };
  }
  const store = (mode) => database.transaction(STORE, mode).objectStore(STORE);
  return {
    persistent: true,
    all: () => done(store("readonly").getAll()),
    get: (id) => done(store("readonly").get(id)),
    put: (conversation) => done(store("readwrite").put(conversation)),
    remove: (id) => done(store("readwrite").delete(id)),
  };
}

/** localStorage or sessionStorage, or memory where the browser forbids them. */
export function storage(name) {
  try {
    return window[name];
  } catch {
    const kept = new Map();
    return { getItem: (key) => kept.get(key) ?? null, setItem: (key, value) => kept.set(key, value), removeItem: (key) => kept.delete(key) };
  }
}

const SETTINGS = "marlin.settings";
const local = storage("localStorage");

/** Settings of the last conversation, which the next one starts with. */
export const lastSettings = {
  get() {
    try {
      const found = JSON.parse(local.getItem(SETTINGS) ?? "{}");
      return found && typeof found === "object" ? found : {};
    } catch {
      return {};
    }
  },
  set: (settings) => local.setItem(SETTINGS, JSON.stringify(settings)),
};

// Conversations, kept in the browser's IndexedDB. Where that is forbidden, they last as long as the page.

const NAME = "qwedge";
const TABLE = "conversations";

/** Where conversations are kept: list(), put(conversation), remove(id). */
export async function openStore() {
  try {
    return new DatabaseStore(await openDatabase());
  } catch {
    return new MemoryStore();
  }
}

/** A new conversation with nothing in it. */
export function newConversation() {
  const now = Date.now() / 1000;
  return { id: newId(), title: "", created: now, updated: now, messages: [] };
}

/** An id that no other conversation has; randomUUID is missing on pages without TLS. */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

class DatabaseStore {
  #database;

  constructor(database) {
    this.#database = database;
  }

  /** All conversations, newest first. */
  async list() {
    return newestFirst(await this.#run("readonly", (table) => table.getAll()));
  }

  /** Keep a conversation; it replaces the one with the same id. */
  async put(conversation) {
    await this.#run("readwrite", (table) => table.put(conversation));
  }

  /** Forget a conversation. */
  async remove(id) {
    await this.#run("readwrite", (table) => table.delete(id));
  }

  #run(mode, work) {
    return promised(work(this.#database.transaction(TABLE, mode).objectStore(TABLE)));
  }
}

class MemoryStore {
  #conversations = new Map();

  async list() {
    return newestFirst([...this.#conversations.values()]);
  }

  async put(conversation) {
    this.#conversations.set(conversation.id, structuredClone(conversation));
  }

  async remove(id) {
    this.#conversations.delete(id);
  }
}

function openDatabase() {
  const request = indexedDB.open(NAME, 1);
  request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
  return promised(request);
}

function promised(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function newestFirst(conversations) {
  return conversations.sort((a, b) => b.updated - a.updated);
}

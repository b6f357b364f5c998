// Conversations kept in this browser: an entry of localStorage each, so that two tabs do not overwrite one another (of
// two with the same conversation, the later one goes on under another id: talk.js).
// Where storage is forbidden or full everything else works. Never a key of the server.

import { readConversation } from "./conversation.js";

const PREFIX = "dpa-conversation-";
export const MOST = 50;
const MOST_CHARACTERS = 2_000_000; // browsers give an origin about 5 million

// localStorage or sessionStorage; touching it throws where the user forbids it.
export function storageOf(name) {
  try {
    return window[name];
  } catch {
    return null;
  }
}

export class Store {
  constructor(storage = storageOf("localStorage")) {
    this.storage = storage;
  }

  // Newest first. What is damaged is passed over.
  list() {
    return this.#keys()
      .map((key) => this.#read(key))
      .filter(Boolean)
      .sort((a, b) => b.changed - a.changed);
  }

  read(id) {
    return this.storage && id ? this.#read(PREFIX + id) : null;
  }

  // Whether it is kept; the oldest give way beyond what this page allows itself, never to what others stored here.
  write(conversation) {
    const written = JSON.stringify(conversation);
    if (!this.storage || written.length > MOST_CHARACTERS) return false;
    try {
      this.storage.setItem(PREFIX + conversation.id, written);
    } catch {
      return false;
    }
    this.#bound(PREFIX + conversation.id);
    return true;
  }

  remove(id) {
    this.#forget(PREFIX + id);
  }

  clear() {
    for (const key of this.#keys()) this.#forget(key);
  }

  #bound(newest) {
    const sizes = this.#keys().map((key) => [key, this.storage.getItem(key)?.length ?? 0]);
    let total = sizes.reduce((sum, [, size]) => sum + size, 0);
    if (sizes.length <= MOST && total <= MOST_CHARACTERS) return;
    const age = ([key]) => this.#read(key)?.changed ?? 0;
    const oldest = sizes.filter(([key]) => key !== newest).sort((a, b) => age(a) - age(b));
    for (let left = sizes.length; oldest.length && (left > MOST || total > MOST_CHARACTERS); left--) {
      const [key, size] = oldest.shift();
      this.#forget(key);
      total -= size;
    }
  }

  #keys() {
    try {
      return Object.keys(this.storage ?? {}).filter((key) => key.startsWith(PREFIX));
    } catch {
      return [];
    }
  }

  #read(key) {
    try {
      const found = readConversation(JSON.parse(this.storage.getItem(key)));
      return found && PREFIX + found.id === key ? found : null; // another id would open and delete another one
    } catch {
      return null;
    }
  }

  #forget(key) {
    try {
      this.storage.removeItem(key);
    } catch {
      // It is gone already, or never was there.
    }
  }
}

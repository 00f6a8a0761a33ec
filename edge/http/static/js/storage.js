// Small values that the browser keeps. Where storage is forbidden, they last as long as the page.

const memory = new Map();

/** What was saved under a key, or null. */
export function load(key) {
  try {
    return localStorage.getItem(key) ?? memory.get(key) ?? null;
  } catch {
    return memory.get(key) ?? null;
  }
}

/** Keep a text under a key. */
export function save(key, value) {
  memory.set(key, value);
  try {
    localStorage.setItem(key, value);
  } catch {
    // Forbidden or full.
  }
}

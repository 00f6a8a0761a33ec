// The API key, where the server wants one: asked for in a dialog, and forgotten with the tab.

import { byId } from "./dom.js";

const STORAGE = "qwedge.key";
let asking = null; // the promise of the open dialog

/** The key, or an empty text. */
export function key() {
  try {
    return sessionStorage.getItem(STORAGE) ?? "";
  } catch {
    return "";
  }
}

/** Ask the user for a key; gives whether there is a new one. Several callers share one dialog. */
export function askForKey() {
  asking ??= ask().finally(() => { asking = null; });
  return asking;
}

/** Forget the key. */
export function forgetKey() {
  sessionStorage.removeItem(STORAGE);
}

async function ask() {
  const dialog = byId("key-dialog");
  const field = byId("key");
  byId("key-wrong").hidden = !key();
  field.value = "";
  dialog.returnValue = "";
  byId("key-cancel").onclick = () => dialog.close();
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  if (dialog.returnValue !== "use" || !field.value.trim()) return false;
  sessionStorage.setItem(STORAGE, field.value.trim());
  field.value = "";
  return true;
}

// The settings dialog. Values live in the browser only.

import { byId } from "./dom.js";

const KEY = "qwedge.settings";
const FIELDS = ["system", "temperature", "max-tokens"];

/** Connect the dialog and show what was saved. */
export function setUpSettings() {
  const dialog = byId("settings");
  restore();
  byId("open-settings").addEventListener("click", () => dialog.showModal());
  byId("reset-settings").addEventListener("click", () => {
    for (const id of FIELDS) byId(id).value = "";
    save();
  });
  for (const id of FIELDS) byId(id).addEventListener("change", save);
}

/** What the settings add to a request. */
export function requestOptions() {
  const options = {};
  if (byId("temperature").value !== "") options.temperature = Number(byId("temperature").value);
  if (byId("max-tokens").value !== "") options.max_tokens = Number(byId("max-tokens").value);
  return options;
}

/** The messages that stand before the conversation. */
export function leadingMessages() {
  const system = byId("system").value.trim();
  return system ? [{ role: "system", content: system }] : [];
}

function save() {
  const values = Object.fromEntries(FIELDS.map((id) => [id, byId(id).value]));
  try {
    localStorage.setItem(KEY, JSON.stringify(values));
  } catch {
    // Storage may be forbidden: then the settings last as long as the page.
  }
}

function restore() {
  try {
    const values = JSON.parse(localStorage.getItem(KEY) ?? "{}");
    for (const id of FIELDS) byId(id).value = values[id] ?? "";
  } catch {
    // Forbidden or damaged storage: start with empty fields.
  }
}

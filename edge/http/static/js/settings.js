// The settings dialog: language and theme, and how the model is asked. Values live in the browser only.

import { byId, element } from "./dom.js";
import { LANGUAGES, fillTexts, language, onLanguageChange, setLanguage, t } from "./i18n.js";
import { forgetKey, key } from "./key.js";
import { load, save } from "./storage.js";
import { setTheme, theme } from "./theme.js";

const KEY = "qwedge.settings";
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];
const FIELDS = ["system", "thinking", "schema", ...NUMBERS];
const CHANGED = new EventTarget();

/** Connect the dialog and show what was saved. */
export function setUpSettings() {
  restore();
  byId("open-settings").addEventListener("click", () => {
    byId("forget-key").hidden = !key();
    byId("settings").showModal();
  });
  byId("reset-settings").addEventListener("click", () => {
    for (const id of FIELDS) byId(id).value = "";
    byId("use-schema").checked = false;
    keep();
  });
  for (const id of FIELDS) byId(id).addEventListener("input", keep);
  byId("use-schema").addEventListener("change", keep);
  byId("schema").addEventListener("input", () => { byId("use-schema").checked = byId("schema").value.trim() !== ""; keep(); });
  byId("forget-key").addEventListener("click", () => { forgetKey(); byId("forget-key").hidden = true; });
  setUpLanguage();
  setUpTheme();
  showSchemaProblem();
  onLanguageChange(showSchemaProblem);
}

/** Call a function whenever a setting has changed. */
export function onSettingsChange(call) {
  CHANGED.addEventListener("change", call);
}

/** What the settings add to a request. */
export function requestOptions() {
  const options = {};
  for (const id of NUMBERS) if (byId(id).value !== "") options[id] = Number(byId(id).value);
  if (byId("thinking").value) options.enable_thinking = byId("thinking").value === "on";
  if (usesSchema()) {
    const { schema } = readSchema();
    options.response_format = { type: "json_schema", json_schema: { name: "answer", schema, strict: true } };
  }
  return options;
}

/** Whether answers have to follow a schema. */
export function usesSchema() {
  return byId("use-schema").checked && readSchema().schema !== null;
}

/** No schema from now on; the text stays. */
export function dropSchema() {
  byId("use-schema").checked = false;
  keep();
}

/** The messages that stand before the conversation. */
export function leadingMessages() {
  const system = byId("system").value.trim();
  return system ? [{ role: "system", content: system }] : [];
}

/** The schema, or null and why there is none. */
function readSchema() {
  const text = byId("schema").value.trim();
  if (!text) return { schema: null, problem: "" };
  try {
    const schema = JSON.parse(text);
    if (typeof schema === "object" && schema !== null && !Array.isArray(schema)) return { schema, problem: "" };
    return { schema: null, problem: t("schemaNoObject") };
  } catch (error) {
    return { schema: null, problem: t("schemaNoJson", { reason: error.message }) };
  }
}

function showSchemaProblem() {
  const { problem } = readSchema();
  byId("schema-problem").textContent = problem;
  byId("schema-problem").hidden = !problem;
  byId("schema").setAttribute("aria-invalid", String(problem !== ""));
}

function setUpLanguage() {
  const options = Object.entries(LANGUAGES).map(([value, textContent]) => element("option", { value, textContent, lang: value }));
  byId("language").append(...options);
  byId("language").value = language();
  byId("language").addEventListener("change", () => setLanguage(byId("language").value));
}

function setUpTheme() {
  byId("theme").value = theme();
  byId("theme").addEventListener("change", () => setTheme(byId("theme").value));
  onLanguageChange(() => fillTexts(byId("theme")));
}

function keep() {
  showSchemaProblem();
  const values = Object.fromEntries(FIELDS.map((id) => [id, byId(id).value]));
  save(KEY, JSON.stringify({ ...values, useSchema: byId("use-schema").checked }));
  CHANGED.dispatchEvent(new Event("change"));
}

function restore() {
  try {
    const { useSchema, ...values } = JSON.parse(load(KEY) ?? "{}");
    for (const id of FIELDS) byId(id).value = values[id] ?? "";
    byId("use-schema").checked = useSchema === true;
  } catch {
    // Damaged: start with empty fields.
  }
}

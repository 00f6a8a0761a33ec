// Conversations as a file: what is exported can be imported, on this device or another one.

import { ApiError } from "../api.js";
import { element } from "../dom.js";
import { t } from "../i18n.js";
import { newId } from "./store.js";

const FORMAT = "qwedge-conversations";
const MAX_BYTES = 64e6;

/** Let the browser save conversations as a file. */
export function exportFile(conversations) {
  const text = JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const date = new Date().toISOString().slice(0, 10);
  element("a", { href: url, download: `qwedge-${date}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

/** The conversations of a file, under new ids: nothing that is here is replaced. Throws an error to show. */
export async function readFile(file) {
  const conversations = file.size <= MAX_BYTES ? parse(await file.text()) : null;
  if (conversations === null) throw new ApiError(t("importFailed", { name: file.name }), { hint: t("importHint") });
  return conversations;
}

function parse(text) {
  try {
    const document = JSON.parse(text);
    if (document.format !== FORMAT || document.version !== 1) return null;
    return document.conversations.map(conversation);
  } catch {
    return null;
  }
}

/** What is known of a conversation, with the types it should have: the file may come from anywhere. */
function conversation({ title, created, updated, messages }) {
  return {
    id: newId(),
    title: String(title ?? "").slice(0, 200),
    created: Number(created) || 0,
    updated: Number(updated) || 0,
    messages: messages.map(message),
  };
}

function message({ role, content, reasoning, figures }) {
  if (role !== "user" && role !== "assistant") throw new TypeError("role");
  const kept = { role, content: String(content) };
  if (reasoning) kept.reasoning = String(reasoning);
  if (figures) kept.figures = numbers(figures);
  return kept;
}

function numbers({ reason, ...figures }) {
  const kept = Object.fromEntries(Object.entries(figures).filter(([, value]) => typeof value === "number"));
  return reason === "length" ? { ...kept, reason } : kept;
}

// The page's language: texts by key, and the numbers and times that go with it.

import { load, save } from "./storage.js";

const KEY = "qwedge.language";
/** Languages by code, in their own words. */
export const LANGUAGES = { en: "English", de: "Deutsch", zh: "中文" };

let current = "en";
let strings = {};
const CHANGED = new EventTarget();

/** The language's code. */
export function language() {
  return current;
}

/** Use the language that was chosen before, or the browser's; wait for it before the first text. */
export async function loadLanguage() {
  const wanted = [load(KEY), ...navigator.languages.map((tag) => tag.slice(0, 2))];
  await use(wanted.find((code) => code in LANGUAGES) ?? "en");
}

/** Change the language, and tell those who listen. */
export async function setLanguage(code) {
  save(KEY, code);
  await use(code);
  CHANGED.dispatchEvent(new Event("change"));
}

/** Call a function whenever the language has changed. */
export function onLanguageChange(call) {
  CHANGED.addEventListener("change", call);
}

/** The text for a key, with {name} replaced from values. */
export function t(key, values = {}) {
  return strings[key].replace(/\{(\w+)\}/g, (_, name) => String(values[name]));
}

/** The text for a key that comes from the server; the key itself where there is none. */
export function tKnown(prefix, key) {
  return strings[prefix + String(key).replaceAll(" ", "_")] ?? String(key);
}

/** A number with so many digits after the point. */
export function number(value, digits = 0) {
  return value.toLocaleString(current, { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/** A number with two digits that count. */
export function significant(value) {
  return value.toLocaleString(current, { maximumSignificantDigits: 2 });
}

/** A number of bytes, in MB or GB. */
export function bytes(value) {
  if (value < 1e3) return `${value} B`;
  if (value < 1e6) return `${number(value / 1e3, 1)} kB`;
  return value < 1e9 ? `${number(value / 1e6)} MB` : `${number(value / 1e9, 2)} GB`;
}

/** The time of day, from seconds since 1970. */
export function timeOfDay(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString(current, { hour12: false });
}

/** Date and time, from seconds since 1970. */
export function dateTime(seconds) {
  return new Date(seconds * 1000).toLocaleString(current, { dateStyle: "medium", timeStyle: "short" });
}

/** How long something took or takes, in words as short as possible. */
export function duration(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : t("days", { count: Math.floor(hours / 24) });
}

/** Fill the static texts: data-t is the content; data-t-placeholder, data-t-title and data-t-label are attributes. */
export function fillTexts(root) {
  for (const node of root.querySelectorAll("[data-t]")) node.textContent = t(node.dataset.t);
  for (const node of root.querySelectorAll("[data-t-placeholder]")) node.placeholder = t(node.dataset.tPlaceholder);
  for (const node of root.querySelectorAll("[data-t-title]")) node.title = t(node.dataset.tTitle);
  for (const node of root.querySelectorAll("[data-t-label]")) node.setAttribute("aria-label", t(node.dataset.tLabel));
}

async function use(code) {
  strings = (await import(`./strings/${code}.js`)).default;
  current = code;
  document.documentElement.lang = code;
  fillTexts(document);
}

// Light, dark, or what the system says: the dark colours are a style sheet whose media query is switched.

import { byId } from "./dom.js";
import { load, save } from "./storage.js";

const KEY = "qwedge.theme";
const MEDIA = { system: "(prefers-color-scheme: dark)", dark: "all", light: "not all" };
const CHANGED = new EventTarget();

/** The chosen theme: "system", "light" or "dark". */
export function theme() {
  const value = load(KEY);
  return value in MEDIA ? value : "system";
}

/** Use a theme from now on. */
export function setTheme(name) {
  byId("dark-colours").media = MEDIA[name];
  save(KEY, name);
  CHANGED.dispatchEvent(new Event("change"));
}

/** Call a function whenever the colours have changed. */
export function onThemeChange(call) {
  CHANGED.addEventListener("change", call);
  matchMedia(MEDIA.system).addEventListener("change", call);
}

/** The present value of a colour, by the name of its CSS variable. */
export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

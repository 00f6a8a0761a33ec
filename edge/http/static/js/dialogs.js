// Small questions to the user: are you sure, and what is its name?

import { byId } from "./dom.js";

/** Whether the user agrees; action is the text of the button that does. */
export async function confirmed(question, action) {
  return (await ask(question, action, null)) !== null;
}

/** A line of text, or null where the user does not want to. */
export async function askText(question, action, value) {
  return ask(question, action, value);
}

async function ask(question, action, value) {
  const dialog = byId("ask-dialog");
  const field = byId("ask-text");
  byId("ask-question").textContent = question;
  byId("ask-ok").textContent = action;
  field.hidden = value === null;
  field.value = value ?? "";
  dialog.returnValue = "";
  byId("ask-cancel").onclick = () => dialog.close();
  dialog.showModal();
  (value === null ? byId("ask-ok") : field).focus();
  if (value !== null) field.select();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  return dialog.returnValue === "ok" ? field.value : null;
}

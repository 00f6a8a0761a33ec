// Installed models: which one runs, and changing it.

import { getJson, sendJson } from "../api.js";
import { confirmed } from "../dialogs.js";
import { button, byId, element, problem } from "../dom.js";
import { bytes, t, tKnown } from "../i18n.js";

/** The list of bundles and the operation under way. */
export class ModelPanel {
  #error = null; // of the last thing the user asked for
  #absent = false; // whether the server manages no models

  /** The view came up. */
  show() {
    this.#absent = false;
  }

  /** Ask for the list again. */
  async refresh() {
    if (this.#absent) return;
    try {
      this.#render(await getJson("v1/bundles", { ask: false }));
    } catch (error) {
      if (error.status !== 404) throw error;
      this.#absent = true;
      byId("bundles").replaceChildren();
      byId("bundle-operation").replaceChildren(element("p", { className: "faint", textContent: t("noStore") }));
    }
  }

  #render({ bundles, operation }) {
    const busy = operation?.state === "running";
    // A row that has the focus stays until it has lost it.
    if (!byId("bundles").contains(document.activeElement)) {
      byId("bundles").replaceChildren(...bundles.map((bundle) => this.#row(bundle, busy)));
    }
    byId("bundle-operation").replaceChildren(...this.#operation(operation));
  }

  #row(bundle, busy) {
    const actions = bundle.active ? [this.#action("verify", bundle, busy)]
      : [this.#action("switch", bundle, busy), this.#action("verify", bundle, busy)];
    if (bundle.previous) actions.push(this.#action("rollback", bundle, busy));
    const marks = ["active", "previous", "failed"].filter((mark) => bundle[mark]);
    const details = [bundle.version, bytes(bundle.size_bytes), bundle.signed_by ?? t("unsigned")].filter(Boolean);
    return element("li", {},
      element("div", { className: "name" }, element("strong", { textContent: bundle.name }), ...marks.map(markNode),
        element("div", { className: "faint", textContent: details.join(" · ") })),
      element("div", { className: "actions" }, ...actions));
  }

  #action(kind, bundle, busy) {
    const node = button(`bundle_${kind}`, () => this.#act(kind, bundle));
    node.disabled = busy;
    node.setAttribute("aria-label", `${t(`bundle_${kind}`)}: ${bundle.name}`);
    return node;
  }

  async #act(kind, { name }) {
    if (kind !== "verify" && !(await confirmed(t(`confirm_${kind}`, { name }), t(`bundle_${kind}`)))) return;
    const path = kind === "rollback" ? "v1/bundles/rollback" : `v1/bundles/${encodeURIComponent(name)}/${kind}`;
    this.#error = null;
    document.activeElement.blur();
    try {
      await sendJson("POST", path);
    } catch (error) {
      this.#error = error;
    }
    await this.refresh();
  }

  #operation(operation) {
    const nodes = this.#error ? [problem(this.#error)] : [];
    if (!operation) return nodes;
    const { kind, name, state, step, progress, error } = operation;
    const title = t("operation", { kind: t(`bundle_${kind}`), name: name ?? "", state: t(`state_${state}`) });
    if (state === "failed") return [...nodes, problem({ message: title, hint: error?.message ?? String(error ?? "") })];
    const bar = state === "running" ? element("progress", { max: 1, value: progress ?? 0, "aria-label": title }) : null;
    return [...nodes, element("p", { role: "status" }, title, step && state === "running" ? ` · ${tKnown("step_", step)}` : ""), ...(bar ? [bar] : [])];
  }
}

function markNode(mark) {
  return element("span", { className: `mark ${mark}`, textContent: t(`bundle_${mark}`) });
}

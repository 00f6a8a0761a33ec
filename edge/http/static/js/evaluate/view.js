// Evaluate: run a suite, see which cases pass, compare with an earlier run.

import { getJson, sendJson } from "../api.js";
import { confirmed } from "../dialogs.js";
import { button, byId, element, problem, setText } from "../dom.js";
import { dateTime, number, onLanguageChange, significant, t } from "../i18n.js";

const EVERY_MS = 1000;
const MAX_SUMMARY = 120; // characters

/** Connect the view; gives what the router wants of it. */
export function evaluateView() {
  const view = new Evaluate();
  return { show: () => view.show(), hide: () => view.hide() };
}

class Evaluate {
  #overview = null;
  #shown = null; // the run on display, with its cases
  #timer = 0;
  #visible = false;

  constructor() {
    byId("evaluate-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#try(() => this.#start());
    });
    byId("evaluate-cancel").addEventListener("click", () => this.#try(() => this.#cancel()));
    byId("suite").addEventListener("change", () => this.#renderSuite());
    byId("compare").addEventListener("change", () => this.#try(() => this.#open(this.#shown.id)));
    byId("only-failed").addEventListener("change", () => this.#renderCases());
    onLanguageChange(() => this.#render());
  }

  show() {
    this.#visible = true;
    this.#try(() => this.#refresh());
  }

  hide() {
    this.#visible = false;
    clearTimeout(this.#timer);
  }

  /** Do something, and show the error where there is one. */
  async #try(act) {
    byId("evaluate-problem").replaceChildren();
    try {
      await act();
    } catch (error) {
      const absent = error.status === 404 && this.#overview === null;
      byId("evaluate-problem").replaceChildren(
        absent ? element("p", { className: "faint", textContent: t("noEvaluations") }) : problem(error));
      byId("evaluate-form").hidden = absent;
    }
  }

  async #start() {
    const run = await sendJson("POST", "v1/evaluations", {
      suite: byId("suite").value, limit: Number(byId("limit").value) || undefined });
    this.#overview.running = run;
    await this.#follow(run.id);
  }

  async #cancel() {
    await sendJson("DELETE", `v1/evaluations/${this.#overview.running.id}`);
  }

  async #refresh() {
    this.#overview = await getJson("v1/evaluations");
    this.#render();
    const { running } = this.#overview;
    if (running) await this.#follow(running.id);
  }

  /** Show a run that is under way until it has ended. */
  async #follow(id) {
    clearTimeout(this.#timer);
    if (!this.#visible) return;
    const run = await getJson(`v1/evaluations/${id}`, { ask: false });
    this.#shown = run;
    this.#overview.running = run.state === "running" ? run : null;
    if (run.state === "running") {
      this.#render();
      this.#timer = setTimeout(() => this.#try(() => this.#follow(id)), EVERY_MS);
      return;
    }
    this.#overview = await getJson("v1/evaluations", { ask: false });
    this.#render();
    byId("result-title").focus();
  }

  /** Show a past run, compared with the chosen one. */
  async #open(id) {
    const baseline = byId("compare").value;
    const query = baseline && baseline !== id ? `?compare=${encodeURIComponent(baseline)}` : "";
    const [run, before] = await Promise.all([
      getJson(`v1/evaluations/${id}${query}`), query ? getJson(`v1/evaluations/${baseline}`) : null]);
    this.#shown = { ...run, before };
    this.#render();
  }

  async #forget(run) {
    if (!(await confirmed(t("forgetRun", { name: `${run.suite} · ${run.target}` }), t("remove")))) return;
    await sendJson("DELETE", `v1/evaluations/${run.id}`);
    if (this.#shown?.id === run.id) this.#shown = null;
    await this.#refresh();
  }

  // --- what is to be seen -------------------------------------------------------------------------------------------

  #render() {
    if (this.#overview === null) return;
    const { suites, running, runs } = this.#overview;
    const before = byId("suite").value;
    byId("suite").replaceChildren(...suites.filter((suite) => !suite.runs_code)
      .map(({ name, cases }) => element("option", { value: name, textContent: t("suiteOption", { name, cases }) })));
    if (before) byId("suite").value = before;
    this.#renderSuite();
    byId("evaluate-start").disabled = running !== null;
    byId("evaluate-cancel").hidden = running === null;
    this.#renderProgress(running);
    byId("runs").replaceChildren(...runs.filter(({ suite }) => suite).map((run) => this.#runRow(run)));
    byId("no-runs").hidden = runs.length > 0;
    this.#renderResult();
  }

  #renderSuite() {
    const suite = this.#overview?.suites.find(({ name }) => name === byId("suite").value);
    byId("suite-about").textContent = suite?.description ?? "";
  }

  #renderProgress(running) {
    const box = byId("evaluate-progress");
    box.hidden = running === null;
    if (running === null) return;
    setText(box.querySelector("p"), t("evaluating", { suite: running.suite, done: running.done, total: running.total }));
    box.querySelector("progress").value = running.done / running.total;
  }

  #runRow(run) {
    const open = button("open", () => this.#try(() => this.#open(run.id)));
    const forget = button("remove", () => this.#try(() => this.#forget(run)));
    return element("tr", {},
      element("th", { scope: "row", textContent: run.suite }),
      element("td", { textContent: run.target }),
      element("td", { textContent: dateTime(Date.parse(run.started) / 1000) }),
      element("td", { textContent: share(run) }),
      element("td", {}, element("div", { className: "actions" }, open, forget)));
  }

  #renderResult() {
    const run = this.#shown;
    byId("evaluate-result").hidden = run === null;
    if (run === null) return;
    byId("result-title").textContent = `${run.suite} · ${run.target}`;
    byId("result-summary").textContent = summary(run);
    this.#renderComparisons();
    this.#renderCases();
  }

  /** Which other runs of the same suite the one on display can be compared with. */
  #renderComparisons() {
    const run = this.#shown;
    const others = this.#overview.runs.filter(({ id, suite }) => suite === run.suite && id !== run.id);
    const before = byId("compare").value;
    byId("compare").replaceChildren(element("option", { value: "", textContent: t("nothing") }),
      ...others.map((other) => element("option",
        { value: other.id, textContent: `${other.target} · ${dateTime(Date.parse(other.started) / 1000)}` })));
    byId("compare").value = others.some(({ id }) => id === before) ? before : "";
    byId("compare").disabled = run.state === "running" || others.length === 0;
  }

  #renderCases() {
    const run = this.#shown;
    const before = new Map((run.before?.cases ?? []).map((each) => [each.digest, each]));
    byId("compare-head").textContent = run.before ? run.before.target : "–";
    const shown = run.cases.filter(({ passed }) => !passed || !byId("only-failed").checked);
    byId("cases").replaceChildren(...shown.map((each) => caseRow(each, before.get(each.digest))));
  }
}

function caseRow(found, before) {
  return element("tr", {},
    element("th", { scope: "row", textContent: found.description || found.id }),
    element("td", {}, verdict(found)),
    element("td", {}, before ? verdict(before) : null),
    element("td", { className: "detail" }, element("details", {},
      element("summary", { textContent: shortened(found.error ?? found.reasons[0] ?? found.answer ?? "") }),
      element("p", {}, element("strong", { textContent: t("question") }), `\n${found.question}`),
      found.answer === null ? null : element("p", {}, element("strong", { textContent: t("answer") }), `\n${found.answer}`),
      before?.answer ? element("p", {}, element("strong", { textContent: t("answerBefore") }), `\n${before.answer}`) : null)));
}

function verdict({ passed }) {
  return element("span", { className: passed ? "passed" : "failed", textContent: t(passed ? "passed" : "failed") });
}

function shortened(text) {
  return text.length > MAX_SUMMARY ? `${text.slice(0, MAX_SUMMARY)} …` : text || "–";
}

function share({ passed, cases }) {
  return `${passed} / ${cases} (${number((100 * passed) / cases)} %)`;
}

function summary(run) {
  const parts = [t("passedOf", { passed: run.passed, total: run.state === "done" ? run.total : run.done })];
  if (run.state !== "done") parts.push(t(`state_${run.state}`));
  if (run.error) parts.push(run.error.message);
  const comparison = run.comparison;
  if (comparison) {
    parts.push(t("comparison", {
      gained: comparison.gained.length, lost: comparison.lost.length, name: comparison.baseline,
      p: significant(comparison.p_value) }));
  }
  return parts.join(" · ");
}

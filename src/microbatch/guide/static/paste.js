// Paste a loop: the server's doctor reads it, and what it finds is written as text, never as HTML.

const SHOWN = 40; // findings; the command shows all of them

// Where a line of a text begins and ends; the last one for a line that is not there.
export function span(text, line) {
  const lines = text.split("\n"), at = Math.min(Math.max(line, 1), lines.length) - 1;
  const start = lines.slice(0, at).reduce((sum, each) => sum + each.length + 1, 0);
  return [start, start + lines[at].length];
}

// Whether there was no loop to judge.
const none = (findings) => findings.length > 0 && findings.every(({ rule }) => rule === "MB001");

// What was found, in one sentence.
export function verdict({ findings, summary }, source = "") {
  const rules = findings.map(({ rule }) => rule);
  if (!rules.length) return "Nothing found. To compare the loop with the full batch, on your own model: microbatch check --loop";
  if (rules.includes("MB000")) return "This text cannot be read.";
  if (none(findings)) return /\.backward\(/.test(source) && /step\(/.test(source)
    ? "This loop takes a step for every batch. That is no fault. To accumulate, write it as above: “By hand” or “With microbatch”."
    : "There is no training loop here.";
  const parts = [
    [summary.certain, "certain"], [summary.depends, summary.depends === 1 ? "that depends" : "that depend"],
    [summary.speed, summary.speed === 1 ? "note on speed" : "notes on speed"],
    [summary.not_judged, "not judged"], [summary.unused_comments, "unused comment"],
  ].filter(([count]) => count);
  return `Found: ${parts.map((part) => part.join(" ")).join(", ")}.`;
}

// Faults first, notes on speed last; otherwise as they stand in the text.
export const ordered = (findings) => [...findings].sort((one, other) => (one.severity === "speed") - (other.severity === "speed"));

export function sure({ confidence, needs }) {
  if (confidence === "certain") return "It happens in every setting that this text allows.";
  if (confidence === "depends") return `It depends on ${needs.join("; ")}. \`microbatch check --loop\` settles it on your own model.`;
  return "";
}

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter(Boolean));
  return element;
}

// Words with code between backticks; short code stays on one line.
const words = (text) => text.split("`").map((part, index) => (index % 2 ? make("code", { textContent: part, className: part.length < 28 ? "whole" : "" }) : part));

const begun = (text) => text.slice(0, 1).toUpperCase() + text.slice(1);

function finding(each, { select, drawn }) {
  const line = make("button", { type: "button", textContent: `Line ${each.line}`, title: "Select this line" });
  line.addEventListener("click", () => select(each.line));
  const list = make("dl", {});
  for (const [title, text] of [["What happens", each.happens], ["How much", each.how_much], ["What to do", each.fix], ["How sure", sure(each)]])
    if (text) list.append(make("dt", { textContent: title }), make("dd", {}, ...words(text)));
  const item = make("li", { className: "finding" },
    make("h4", { textContent: `${each.rule} ${each.name}` }), make("span", { className: "sure", textContent: each.confidence }), line,
    make("p", { className: "what" }, ...words(begun(each.message))), list, drawing(each, drawn));
  item.dataset.sure = each.severity === "speed" ? "note" : each.confidence;
  return item;
}

// The same windows are open once.
function drawing({ rule, window: text }, drawn) {
  if (!text) return null;
  const pre = make("pre", { className: "listing", tabIndex: 0, textContent: text });
  pre.setAttribute("role", "region");
  pre.setAttribute("aria-label", `Windows: ${rule}`);
  const open = !drawn.has(text);
  drawn.add(text);
  return make("details", { open }, make("summary", { textContent: "Which microbatches enter which step" }),
    make("p", { className: "help" }, ...words("`5*1/4` is the microbatch number 5 with the weight 1/4.")), pre);
}

export function startPaste() {
  const place = document.querySelector("[data-paste]");
  if (!place) return; // a copy without a server
  const find = (name) => place.querySelector(`[data-${name}]`);
  const area = place.querySelector("textarea"), told = find("told"), list = find("findings"), mine = find("mine");
  const loops = [...place.querySelectorAll("[data-loop]")], most = Number(area.dataset.most);
  let asked = 0, own = "";
  place.hidden = false;

  function select(line) {
    area.setSelectionRange(...span(area.value, line));
    area.focus();
    area.scrollLeft = 0;
    area.scrollTop = (line - 3) * parseFloat(getComputedStyle(area).lineHeight);
  }

  function show(sentence, findings = []) {
    const drawn = new Set(), shown = ordered(findings).slice(0, SHOWN);
    list.replaceChildren(...shown.map((each) => finding(each, { select, drawn })));
    told.textContent = findings.length > SHOWN ? `${sentence} These are the first ${SHOWN}; microbatch doctor shows all.` : sentence;
  }

  async function ask(source) {
    if (source.length > most) return { error: `the text has ${source.length.toLocaleString("en")} characters, and ${most.toLocaleString("en")} are read at most; paste the loop alone, with the functions that it calls` };
    try {
      const answer = await fetch("api/doctor", { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify({ source }) });
      return await answer.json();
    } catch {
      return { error: "the server does not answer; start it again with: microbatch guide" };
    }
  }

  async function check() {
    const turn = ++asked;
    told.textContent = "Reading …";
    const source = area.value, answer = await ask(source);
    if (turn !== asked) return; // another one was asked for since
    if (answer.error) show(`Not checked: ${answer.error}.`);
    else show(verdict(answer, source), none(answer.findings) ? [] : answer.findings);
  }

  // A text of the reader's own is kept while another one is tried.
  function put(text) {
    if (!loops.some(({ dataset }) => dataset.loop === area.value)) own = area.value;
    area.value = text;
    area.scrollTo(0, 0);
    changed();
    list.replaceChildren();
    check();
  }

  function changed() {
    asked += 1;
    for (const each of loops) each.setAttribute("aria-pressed", String(each.dataset.loop === area.value));
    mine.hidden = !own || own === area.value;
    told.textContent = list.childElementCount ? "Changed since it was checked." : "Not checked yet.";
  }

  for (const each of loops) each.addEventListener("click", () => put(each.dataset.loop));
  mine.addEventListener("click", () => (put(own), area.focus()));
  area.addEventListener("input", changed);
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) (event.preventDefault(), check());
  });
  find("check").addEventListener("click", check);
}

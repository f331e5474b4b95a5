"use strict";
// The trajectory viewer: filters, a list, and the attempts at one task next to each other. All text is set as text.

const byId = (id) => document.getElementById(id);
const runs = JSON.parse(byId("runs").textContent);
const AT_ONCE = 200; // lines of the list that are made at first, and with each "more"
const TURN = ["thought", "action", "observation", "thought_by", "action_by", "valid", "errors"];

function element(tag, text, name) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}

async function read() {
  if (!("DecompressionStream" in window)) throw new Error("this browser is too old to open them (2023 or newer does)");
  const bytes = Uint8Array.from(atob(byId("data").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const found = await new Response(stream).json();
  for (const entry of found) {
    entry.turns = entry.turns.map((values) => Object.fromEntries(TURN.map((name, i) => [name, values[i]])));
    entry.trained ??= [];
    entry.text = textOf(entry);
  }
  return found;
}

// ---- filters --------------------------------------------------------------------------------------------------------

const FILTERS = {
  run: ["all runs", (e) => runs[e.run]],
  stage: ["all stages", (e) => e.stage],
  type: ["all task types", (e) => e.type],
  source: ["all sources", (e) => e.source],
  end: ["all ends", (e) => e.end],
  trained: ["trained on or not", (e) => (e.trained.length ? "trained on" : "not trained on")],
};

function fillFilters(form, entries) {
  for (const [name, [all, value]] of Object.entries(FILTERS)) {
    const values = [...new Set(entries.map(value))].filter((v) => v !== "");
    values.sort((a, b) => a.localeCompare(b, undefined, { numeric: true }));
    form[name].append(new Option(all, ""), ...values.map((v) => new Option(v, v)));
    form[name].hidden = values.length < 2;
  }
}

function textOf(entry) {
  const turns = entry.turns.map((t) => `${t.thought}\n${t.action}`).join("\n");
  return `${entry.task_id}\n${entry.task}\n${turns}`.toLowerCase();
}

function matching(form, entries) {
  const text = form.text.value.trim().toLowerCase();
  const chosen = Object.entries(FILTERS).filter(([name]) => form[name].value);
  return entries.filter(
    (e) => chosen.every(([name, [, value]]) => value(e) === form[name].value) && (!text || e.text.includes(text))
  );
}

// ---- one trajectory --------------------------------------------------------------------------------------------------

const outcome = (e) => element("span", e.success ? "✓ success" : `✗ ${e.end}`, e.success ? "won" : "lost");
const again = (e) => (e.trial && ["react", "actre"].includes(e.source) ? `, attempt ${e.trial + 1}` : "");
const where = (e) => (runs.length > 1 ? `${runs[e.run]}: ` : "") + e.stage + again(e);
const sampled = (e) => e.turns.filter((t) => t.action_by === "sampled").length;

function actionLine(turn) {
  const [sign, name] = turn.errors.length
    ? ["✗", "mistake"]
    : !turn.valid
      ? ["⊘", "refused"]
      : turn.action_by === "sampled"
        ? ["◆", "sampled"]
        : [">", ""];
  const notes = [turn.action_by === "react" ? "" : turn.action_by, turn.valid ? "" : "refused", ...turn.errors];
  const line = element("p", `${sign} ${turn.action}`, `action ${name}`);
  const note = notes.filter(Boolean).join(", ");
  if (note) line.append(" ", element("small", `(${note})`));
  return line;
}

function played(entry) {
  const lines = [element("p", entry.opening, "observation")];
  for (const turn of entry.turns) {
    if (turn.thought) {
      const line = element("p", turn.thought, "thought");
      if (turn.thought_by !== "react") line.append(" ", element("small", `(by ${turn.thought_by})`));
      lines.push(line);
    }
    lines.push(actionLine(turn), element("p", turn.observation, "observation"));
  }
  return lines;
}

function weighted(pieces) {
  const line = element("p");
  for (const [text, weight] of pieces) {
    const part = element("span", text, weight > 0 ? "plus" : weight < 0 ? "minus" : "observation");
    part.style.setProperty("--weight", Math.min(1, Math.abs(weight)));
    part.title = `weight ${weight}`;
    line.append(part);
  }
  return [line];
}

function column(entry) {
  const made = element("article");
  const head = element("p");
  head.append(element("strong", where(entry)), " ", outcome(entry));
  const facts = `${entry.turns.length} turns, reward ${entry.reward}, progress ${entry.progress}, by ${entry.source}`;
  const body = element("div");
  body.append(...played(entry));
  made.append(head, element("p", facts, "note"));
  if (entry.trained.length) {
    const choice = element("select");
    choice.setAttribute("aria-label", "text");
    choice.append(new Option("as played", ""));
    entry.trained.forEach((t, i) => choice.append(new Option(`weights of round ${t.rounds.join(", ")}`, i)));
    choice.onchange = () =>
      body.replaceChildren(...(choice.value ? weighted(entry.trained[choice.value].pieces) : played(entry)));
    made.append(choice);
  }
  made.append(body);
  return made;
}

// Attempts at the same task; those of the same kind of stage (the last folder's name) stand side by side at first.
function show(entry, entries) {
  const key = (e) => JSON.stringify([e.env, e.task_id, e.opening]); // runs may differ in what an id stands for
  const same = entries.filter((e) => key(e) === key(entry));
  const kind = (e) => e.stage.split("/").pop();
  const open = new Set(same.filter((e) => kind(e) === kind(entry) && e.trial === entry.trial).slice(0, 6));
  open.add(entry);
  const columns = element("div", undefined, "columns");
  const attempts = element("div", undefined, "attempts");
  const draw = () => columns.replaceChildren(...same.filter((e) => open.has(e)).map(column));
  for (const each of same.length > 1 ? same : []) {
    const button = element("button", `${each.success ? "✓" : "✗"} ${where(each)}`);
    button.type = "button";
    button.setAttribute("aria-pressed", open.has(each));
    button.onclick = () => {
      open.delete(each) || open.add(each);
      button.setAttribute("aria-pressed", open.has(each));
      draw();
    };
    attempts.append(button);
  }
  draw();
  byId("shown").replaceChildren(element("h3", entry.task), element("p", entry.task_id, "note"), attempts, columns);
}

// ---- the list --------------------------------------------------------------------------------------------------------

function list(found, entries) {
  const items = byId("list");
  items.replaceChildren();
  const add = (start) => {
    for (const entry of found.slice(start, start + AT_ONCE)) {
      const button = element("button");
      button.type = "button";
      const facts = `${where(entry)}, ${entry.turns.length} turns` + (sampled(entry) ? `, ${sampled(entry)} sampled` : "");
      button.append(outcome(entry), ` ${entry.task} `, element("small", facts));
      button.onclick = () => {
        items.querySelector("[aria-current]")?.removeAttribute("aria-current");
        button.setAttribute("aria-current", "true");
        show(entry, entries);
      };
      items.append(element("li"));
      items.lastChild.append(button);
    }
    const rest = found.length - start - AT_ONCE;
    if (rest > 0) {
      const more = element("button", `${rest} more`);
      more.type = "button";
      more.onclick = () => {
        more.parentNode.remove();
        add(start + AT_ONCE);
      };
      items.append(element("li"));
      items.lastChild.append(more);
    }
  };
  add(0);
}

read().then((entries) => {
  const form = byId("filters");
  fillFilters(form, entries);
  const update = () => {
    const found = matching(form, entries);
    const won = found.filter((e) => e.success).length;
    form.querySelector("output").textContent = `${found.length} of ${entries.length}, ${won} solved`;
    list(found, entries);
    if (!found.length) byId("list").append(element("li", "none: choose other filters"));
    else byId("list").querySelector("button").click();
  };
  form.oninput = update;
  form.onsubmit = (event) => event.preventDefault();
  update();
  performance.mark("opened");
}).catch((error) => byId("shown").append(element("p", `The trajectories cannot be shown: ${error.message}.`)));

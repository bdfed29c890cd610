"use strict";
// Shows and filters the rows of the page's data. Texts of models are set as text, never as markup.
(() => {
  const box = document.getElementById("data");
  const sources = JSON.parse(box ? box.textContent : "[]");
  const at = (id) => document.getElementById(id);
  const PAGE = 20;
  const SAID = { fixed: "fixed", broken: "newly broken", still: "still broken", kept: "kept" };
  let shown = PAGE;
  let found = [];

  function make(tag, classes, ...children) {
    const made = document.createElement(tag);
    if (classes) made.className = classes;
    made.append(...children.filter((c) => c !== null && c !== ""));
    return made;
  }

  // Whatever a row says, once, in lower case.
  function haystack(row) {
    if (!row.hay) {
      const texts = [row.id, row.prompt, ...row.parts.map((p) => p.text)];
      texts.push(...row.facts.flat(), ...row.lineage.flat());
      Object.defineProperty(row, "hay", { value: texts.join("\n").toLowerCase() });
    }
    return row.hay;
  }

  function became(row, principle, outcome) {
    const tags = row.tags.filter(([id]) => !principle || id === principle);
    if (!outcome) return !principle || tags.length > 0;
    const is = (...wanted) => tags.some(([, what]) => wanted.includes(what));
    if (outcome === "unchanged") return tags.length > 0 && !is("fixed", "broken");
    return is(outcome);
  }

  function choice() {
    const radio = document.querySelector("input[name=outcome]:checked");
    const source = sources[Number(at("source").value)] || sources[0];
    return {
      source,
      principle: at("principle").value,
      outcome: source.compares && radio ? radio.value : "",
      words: at("search").value.toLowerCase().split(/\s+/).filter(Boolean),
    };
  }

  function passes(row, want, outcome) {
    return became(row, want.principle, outcome) && want.words.every((w) => haystack(row).includes(w));
  }

  function marks(row) {
    const made = make("span", "marks");
    for (const [id, what] of row.tags) {
      if (what === "kept") continue;
      made.append(make("span", `mark ${what}`, what ? `${id}: ${SAID[what] || what}` : id));
    }
    return made;
  }

  // A text of data: it may be written from right to left.
  function written(tag, classes, text) {
    const made = make(tag, classes, text);
    made.dir = "auto";
    return made;
  }

  function part(row, p) {
    const head = make("h4", "", p.label, make("span", "", p.notes || ""));
    const side = ["before", "after", "chosen", "rejected"].includes(p.label) ? ` ${p.label}` : "";
    const made = make("div", `text${side}`, head, written("p", "said", p.text || "(empty)"));
    if (p.broken && p.broken.length) {
      const why = p.unusable ? ` (the answer counts as broken throughout: ${p.unusable})` : "";
      made.append(make("p", "breaks", `breaks ${p.broken.join(", ")}${why}`));
    } else if (p.broken) {
      made.append(make("p", "breaks", "keeps every principle"));
    }
    return made;
  }

  function list(classes, items) {
    return make("ul", classes, ...items);
  }

  function browse(step, principle) {
    const index = sources.findIndex((s) => s.step === step);
    if (index < 0) return;
    at("source").value = String(index);
    turn();
    at("principle").value = principle;
    at("search").value = "";
    show(true);
    at("samples").scrollIntoView();
    at("source").focus({ preventScroll: true });
  }

  function taught(row) {
    return row.taught.map(([id, step, n]) => {
      const button = make("button", "small", "browse them");
      button.type = "button";
      button.setAttribute("aria-label", `browse the training rows of ${id}`);
      button.addEventListener("click", () => browse(step, id));
      const rows = n === 1 ? "1 training row touches" : `${n} training rows touch`;
      return make("li", "", `${rows} ${id} in ${step} `, button);
    });
  }

  // The folder of the run, which this page lies in; "" where that is not known.
  function folder() {
    try {
      const path = decodeURIComponent(location.pathname.replace(/\/[^/]*$/, ""));
      return location.protocol === "file:" ? path || "/" : "";
    } catch {
      return "";  // a name that is not UTF-8
    }
  }

  // A command in one line; a shell takes what is quoted as it is. Ids are whatever the data has.
  function command(row, step) {
    const quoted = (word) => `'${word.replaceAll("'", "'\\''")}'`;
    const run = folder() ? ` --run ${quoted(folder())}` : "";
    const text = `truing why ${quoted(`${step}/${row.id}`)}${run}`;
    if (/[\p{Cc}\u2028\u2029]/u.test(text)) return "";
    const button = make("button", "small", "copy");
    button.type = "button";
    button.setAttribute("aria-label", `copy the command ${text}`);
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "copied";
      } catch {
        getSelection().selectAllChildren(button.previousSibling);
        button.textContent = "selected";
      }
    });
    return make("div", "ask-why", make("code", "", text), button);
  }

  function body(row, step) {
    const made = make("div", "item-body", make("div", "texts", ...row.parts.map((p) => part(row, p))));
    if (row.why.length) {
      const rules = row.why.map(([id, text]) => make("li", "", make("b", "", id), "  ", make("bdi", "", text)));
      made.append(list("why", rules));
    }
    const facts = make("dl", "facts");
    for (const [name, value] of [...row.facts, ...row.lineage]) {
      facts.append(make("dt", "", name), make("dd", "", value));
    }
    made.append(make("h4", "sub", "Where it comes from"), facts);
    const links = row.chain.map(([depth, id, steps, text]) =>
      make("li", `d${Math.min(depth, 4)}`, make("b", "", steps), " ", make("bdi", "", text), " ", make("code", "soft", id)));
    if (links.length) made.append(list("chain", links));
    if (row.taught.length) made.append(list("chain", taught(row)));
    made.append(command(row, step));
    return made;
  }

  function item(row, number, step) {
    const head = make("button", "item-head", written("span", "ask", row.prompt || "(no prompt)"), marks(row));
    head.type = "button";
    head.setAttribute("aria-expanded", "false");
    const made = make("li", "item", head);
    head.addEventListener("click", () => {
      const open = head.getAttribute("aria-expanded") !== "true";
      head.setAttribute("aria-expanded", String(open));
      if (made.children.length === 1) {
        const more = body(row, step);
        more.id = `row-${number}`;
        head.setAttribute("aria-controls", more.id);
        made.append(more);
      }
      made.lastChild.hidden = !open;
    });
    return made;
  }

  function counts(want) {
    for (const badge of document.querySelectorAll("[data-n]")) {
      const n = want.source.rows.filter((r) => passes(r, want, badge.dataset.n)).length;
      badge.textContent = String(n);
    }
  }

  function show(fresh) {
    const want = choice();
    if (fresh) shown = PAGE;
    found = want.source.rows.filter((r) => passes(r, want, want.outcome));
    const kept = fresh ? 0 : at("list").children.length;
    if (fresh) at("list").replaceChildren();
    at("list").append(...found.slice(kept, shown).map((r, i) => item(r, kept + i, want.source.step)));
    at("more").hidden = found.length <= shown;
    at("outcomes").hidden = !want.source.compares;
    counts(want);
    const { rows, total } = want.source;
    const part = rows.length < total ? `; this page holds the first ${rows.length} of ${total}` : "";
    at("count").textContent = `${found.length} of ${rows.length} rows match${part}`;
  }

  // Another source: its principles.
  function turn() {
    const { source } = choice();
    const options = source.principles.map((id) => new Option(id, id));
    at("principle").replaceChildren(new Option("any", ""), ...options);
    at("principle").disabled = options.length === 0;
  }

  // Arrow keys walk through the list.
  function walk(event) {
    const heads = [...document.querySelectorAll("#list .item-head")];
    const here = heads.indexOf(document.activeElement);
    const to = { ArrowDown: here + 1, ArrowUp: here - 1, Home: 0, End: heads.length - 1 }[event.key];
    if (here < 0 || to === undefined || !heads[to]) return;
    event.preventDefault();
    heads[to].focus();
  }

  // A link to a step opens what hides it.
  function reveal() {
    const target = location.hash ? at(location.hash.slice(1)) : null;
    for (let one = target; one; one = one.parentElement) {
      if (one.tagName === "DETAILS") one.open = true;
    }
    if (target) target.scrollIntoView();
  }

  addEventListener("hashchange", reveal);
  if (location.hash) reveal();
  if (!sources.length) return;
  at("filters").hidden = false;
  at("filters").addEventListener("submit", (event) => event.preventDefault());
  at("source").addEventListener("change", () => { turn(); show(true); });
  for (const id of ["principle", "outcomes"]) at(id).addEventListener("change", () => show(true));
  at("search").addEventListener("input", () => show(true));
  at("list").addEventListener("keydown", walk);
  at("more").addEventListener("click", () => { shown += PAGE; show(false); });
  turn();
  show(true);
})();

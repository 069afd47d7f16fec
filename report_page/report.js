"use strict";
// The browser of answers. The data are what models wrote: they go into text nodes and nowhere else.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const PAGE = 10;
  const NAMES = { a: "agreed", c: "changed", f: "fell_back" };
  const EVENTS = {
    agreed: "both models agreed",
    changed: "the aligner changed it",
    fell_back: "fell back to the proposal",
  };
  const OUTCOMES = { win: "win", tie: "tie", loss: "loss", failed: "not judged" };
  const systems = data.systems;
  const pairs = systems.some((system) => system.pair);
  const says = (key) => data.rows.some((row) => row.answers.some((answer) => key in answer.judged));
  const detailed = data.rows.filter((row) => row.answers.some((answer) => answer.tokens)).length;
  const state = { find: "", system: -1, outcome: "", tokens: "", judged: "", sort: "row" };
  const hidden = new Set();
  const haystacks = [];
  let order = data.rows.map((_, place) => place);
  let page = 0;

  // ---- small helpers ----------------------------------------------------------------------------------------

  // Control characters and what turns a line's direction, as signs; all else is text as it stands.
  const visible = (text) =>
    text
      .replace(/[\0-\x08\x0b-\x1f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
      .replace(/[\x7f-\x9f\u202a-\u202e\u2066-\u2069]/g, "\ufffd");

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === true) element.setAttribute(name, "");
      else if (value !== false && value !== null) element.setAttribute(name, value);
    }
    for (const child of children) {
      element.append(typeof child === "string" ? visible(child) : child);
    }
    return element;
  }

  // A long name breaks where its parts meet.
  const breakable = (name) => name.split(/(?<=\+)/).flatMap((part) => [make("wbr"), part]).slice(1);
  const number = (value, digits = 3) => (value == null ? "–" : value.toFixed(digits).replace("-", "−"));
  const share = (value) => (value === 0 ? "0" : value < 0.001 ? "<.001" : value.toFixed(3));
  const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

  function outcome(answer) {
    const { preference, failed } = answer.judged;
    if (failed !== undefined) return "failed";
    return preference > 0.5 ? "win" : preference < 0.5 ? "loss" : "tie";
  }

  const written = (answer) =>
    answer.text ?? (answer.tokens ? answer.tokens.join("") : answer.runs.map((run) => run[1]).join(""));

  // ---- which rows, in which order ---------------------------------------------------------------------------

  function haystack(place) {
    const row = data.rows[place];
    haystacks[place] ??= [row.prompt, row.reference ?? "", ...row.answers.map(written)].join("\n").toLowerCase();
    return haystacks[place];
  }

  function fits(answer) {
    const { judged, events } = answer;
    if (state.outcome && outcome(answer) !== state.outcome) return false;
    if (state.tokens === "changed" && !events?.c) return false;
    if (state.tokens === "fell_back" && !events?.f) return false;
    if (state.tokens === "figures" && !answer.tokens) return false;
    if (!state.judged) return true;
    const wanted = !state.judged.startsWith("not ");
    const key = state.judged.replace("not ", "");
    return key in judged && Boolean(judged[key]) === wanted;
  }

  const SORTS = {
    row: ["order of the rows"],
    worst: ["lowest preference first", (answer) => answer.judged.preference, 1],
    best: ["highest preference first", (answer) => answer.judged.preference, -1],
    longest: ["longest first", (answer) => answer.length, -1],
    shortest: ["shortest first", (answer) => answer.length, 1],
    changed: ["most tokens changed first", (answer) => answer.events?.c / answer.n, -1],
    fallback: ["most fell back first", (answer) => answer.stats?.fallback, -1],
    kl: ["highest mean KL first", (answer) => answer.stats?.kl, -1],
  };

  function choose() {
    const find = state.find.toLowerCase();
    const anything = state.outcome || state.tokens || state.judged;
    const of = (row) => (state.system < 0 ? row.answers : [row.answers[state.system]]);
    order = [];
    data.rows.forEach((row, place) => {
      if (find && !haystack(place).includes(find)) return;
      if (anything && !of(row).some(fits)) return;
      order.push(place);
    });
    const [, value, sign] = SORTS[state.sort];
    if (value) {
      // Of several systems the one that comes first decides; rows without a value stand at the end.
      const keys = new Map();
      for (const place of order) {
        const found = of(data.rows[place]).map(value).filter((x) => Number.isFinite(x));
        keys.set(place, found.length ? Math.min(...found.map((x) => sign * x)) : Infinity);
      }
      order.sort((a, b) => (keys.get(a) === keys.get(b) ? a - b : keys.get(a) < keys.get(b) ? -1 : 1));
    }
  }

  // ---- cards ------------------------------------------------------------------------------------------------

  const STEPS = [0.1, 0.5, 1.5, 3]; // nats of influence from which on a colour is deeper

  function shade(influence) {
    if (influence === "outside") return "up4";
    const depth = STEPS.filter((step) => Math.abs(influence ?? 0) >= step).length;
    return depth ? `${influence > 0 ? "up" : "down"}${depth}` : "";
  }

  const blank = (text) => (text.includes("\n") && !text.trim() ? "newline" : "");

  function words(answer, place, at) {
    const holder = make("p", { class: "words", dir: "auto" });
    if (answer.tokens) {
      const end = answer.tokens.join("").length - answer.tail;
      let start = 0;
      answer.tokens.forEach((token, step) => {
        const event = NAMES[answer.codes[step]];
        const marks = ["token", event, shade(answer.influence[step]), blank(token), start >= end ? "tail" : ""];
        const tab = step ? "-1" : "0";
        const span = make("span", { class: marks.filter(Boolean).join(" "), tabindex: tab }, token);
        Object.assign(span.dataset, { place, at, step });
        holder.append(span);
        start += token.length;
      });
    } else if (answer.runs) {
      const end = answer.runs.reduce((sum, run) => sum + run[1].length, 0) - answer.tail;
      let start = 0;
      for (const [code, text] of answer.runs) {
        const event = NAMES[code];
        const inside = Math.max(0, Math.min(text.length, end - start));
        const parts = [[text.slice(0, inside), ""], [text.slice(inside), "tail"]];
        for (const [part, tail] of parts) {
          const marks = [event, event === "agreed" ? "" : blank(part), tail].filter(Boolean).join(" ");
          if (part) holder.append(make("span", { class: marks, title: EVENTS[event] }, part));
        }
        start += text.length;
      }
    } else {
      holder.append(visible(answer.text));
    }
    if (!holder.textContent) holder.append(make("span", { class: "small" }, "(empty)"));
    return holder;
  }

  function facts(answer) {
    const found = [plural(answer.n, "token")];
    if (answer.cut) found.push("cut at the limit");
    if (answer.stats) {
      found.push(`${answer.events.c} changed`, `${answer.events.f} fell back`, `KL ${number(answer.stats.kl, 2)}`);
      found.push(`accepted ${number(answer.stats.acceptance, 2)}`);
    }
    return make("p", { class: "small" }, found.join(" · "));
  }

  function judgement(answer, place, at) {
    const row = data.rows[place];
    const { judged } = answer;
    const list = make("dl");
    for (const [key, value] of Object.entries(judged)) {
      const label = key === "first" ? "first (what the answer shown first got)" : key;
      const said = typeof value === "number" ? number(value, 4) : String(value);
      list.append(make("dt", {}, label), make("dd", {}, said));
    }
    const path = systems[at].judgements;
    const address = path.split("/").map(encodeURIComponent).join("/");
    const file = make("p", { class: "small" }, "Line ", String(place + 1), " of ");
    file.append(make("a", { href: address }, path));
    const hash = `#row-${row.id}/${at + 1}`;
    const link = make("a", { href: hash }, "link to this judgement");
    const head = judged.failed !== undefined ? "judgement failed" : `preference ${number(judged.preference)}`;
    return make("details", { class: "judgement" }, make("summary", {}, head), list, file, link);
  }

  function card(place, at) {
    const answer = data.rows[place].answers[at];
    const system = systems[at];
    const kind = outcome(answer);
    const title = make("h4", {}, make("span", { class: "small" }, String(at + 1)), "\u00a0", ...breakable(system.name));
    const marks = make("p", { class: "marks" }, make("b", { class: kind }, OUTCOMES[kind]));
    for (const key of ["correct", "aligned"]) {
      if (key in answer.judged) {
        const yes = Boolean(answer.judged[key]);
        marks.append(" · ", make("span", { class: yes ? "" : "no" }, yes ? key : `not ${key}`));
      }
    }
    if (data.reference === system.name) marks.append(" · reference");
    return make(
      "article", { class: "card" },
      title, marks, words(answer, place, at), facts(answer), judgement(answer, place, at),
    );
  }

  function rowElement(place) {
    const row = data.rows[place];
    const title = make("h3", {}, make("a", { href: `#row-${row.id}` }, `Row ${row.id}`));
    const long = row.prompt.length > 300;
    const style = `words prompt${long ? " long" : ""}`;
    const prompt = make("p", { class: style, dir: "auto", tabindex: long ? "0" : null }, row.prompt);
    const cards = make("div", { class: "cards" });
    if (row.reference !== null) {
      const name = data.reference === "output" ? "Reference" : "In the test file";
      const text = make("p", { class: "words", dir: "auto" }, row.reference);
      const length = make("p", { class: "small" }, plural(row.reference.length, "character"));
      cards.append(make("article", { class: "card given" }, make("h4", {}, name), text, length));
    }
    systems.forEach((_, at) => hidden.has(at) || cards.append(card(place, at)));
    const label = { id: `row-${row.id}`, class: "row", tabindex: "-1", "aria-label": `Row ${row.id}` };
    return make("section", label, title, prompt, cards);
  }

  // ---- the controls -----------------------------------------------------------------------------------------

  const browser = document.getElementById("browser");
  const rows = make("div", { class: "rows" });
  const status = make("p", { class: "status", role: "status" });
  const search = make("input", { type: "search", id: "find", autocomplete: "off", spellcheck: "false" });
  search.placeholder = "text in prompt or answers";

  function select(name, label, options) {
    const element = make("select", { id: `by-${name}` });
    for (const [value, words] of options) element.append(make("option", { value }, words));
    element.value = String(state[name]);
    element.addEventListener("change", () => {
      state[name] = name === "system" ? Number(element.value) : element.value;
      update();
    });
    return make("label", {}, make("span", {}, label), element);
  }

  function controls() {
    const found = make("div", { class: "controls", role: "search", "aria-label": "Which rows are shown" });
    found.append(make("label", { class: "find" }, make("span", {}, "Find (press /)"), search));
    found.append(select("system", "System", [[-1, "any"], ...systems.map((s, at) => [at, `${at + 1} ${s.name}`])]));
    const outcomes = [["", "any"], ["win", "wins"], ["tie", "ties"], ["loss", "losses"], ["failed", "not judged"]];
    found.append(select("outcome", "Outcome", outcomes));
    if (pairs) {
      const events = [["", "any"], ["changed", "some changed"], ["fell_back", "some fell back"]];
      if (detailed) events.push(["figures", "with figures"]);
      found.append(select("tokens", "Tokens", events));
    }
    const keys = ["correct", "aligned", "both"].filter(says);
    if (keys.length) {
      const judged = keys.flatMap((key) => [[key, key], [`not ${key}`, `not ${key}`]]);
      found.append(select("judged", "Judge says", [["", "any"], ...judged]));
    }
    const sorts = Object.entries(SORTS).filter(([key]) => pairs || !["changed", "fallback", "kl"].includes(key));
    found.append(select("sort", "Order", sorts.map(([key, [words]]) => [key, words])));
    return found;
  }

  function shownSystems() {
    const summary = make("summary");
    const say = () => (summary.textContent = `Systems shown: ${systems.length - hidden.size} of ${systems.length}`);
    const boxes = systems.map((system, at) => {
      const box = make("input", { type: "checkbox" });
      box.checked = true;
      box.addEventListener("change", () => {
        if (box.checked) hidden.delete(at);
        else hidden.add(at);
        say();
        draw();
      });
      return make("label", {}, box, ` ${at + 1} ${system.name}`);
    });
    say();
    return make("details", { class: "shown" }, summary, make("div", { class: "boxes" }, ...boxes));
  }

  function legend() {
    const found = make("div", { class: "legend small" });
    const line = make("p", {}, "Tokens of a pair: ");
    for (const [event, meaning] of Object.entries(EVENTS)) {
      line.append(make("span", { class: event }, meaning), event === "fell_back" ? "." : ", ");
    }
    found.append(line);
    if (detailed) {
      const scale = make("p", {}, "Aligner's influence, log p − log P_M in nats: ");
      const steps = [["down4", "≤ −3"], ["down3", "−1.5"], ["down2", "−0.5"], ["down1", "−0.1"], ["", "0"]];
      steps.push(["up1", "0.1"], ["up2", "0.5"], ["up3", "1.5"], ["up4", "≥ 3"]);
      for (const [mark, words] of steps) scale.append(make("span", { class: `swatch ${mark}` }, words));
      const meant =
        `p is the pair's law, P_M the proposal's own at its settings. ${detailed} of ${plural(data.rows.length, "row")} ` +
        "have such figures: point at a token, tap it, or walk with ← and →.";
      found.append(scale, make("p", {}, meant));
    }
    for (const system of systems) {
      if (system.note) found.append(make("p", {}, `${system.name}: ${system.note}.`));
    }
    return found;
  }

  const pagers = [];

  function pager() {
    const earlier = make("button", { type: "button" }, "‹ earlier");
    const later = make("button", { type: "button" }, "later ›");
    const where = make("span", { class: "small" });
    earlier.addEventListener("click", () => turn(page - 1));
    later.addEventListener("click", () => turn(page + 1));
    pagers.push({ earlier, later, where });
    return make("nav", { class: "pager", "aria-label": "Pages of rows" }, earlier, where, later);
  }

  function draw() {
    hide();
    const last = Math.max(0, Math.ceil(order.length / PAGE) - 1);
    page = Math.min(Math.max(page, 0), last);
    rows.replaceChildren(...order.slice(page * PAGE, (page + 1) * PAGE).map(rowElement));
    status.textContent =
      order.length === data.rows.length
        ? plural(order.length, "row")
        : `${order.length.toLocaleString("en")} of ${plural(data.rows.length, "row")}`;
    for (const { earlier, later, where } of pagers) {
      earlier.disabled = page === 0;
      later.disabled = page === last;
      where.textContent = `page ${page + 1} of ${last + 1}`;
    }
  }

  function update() {
    choose();
    page = 0;
    draw();
  }

  function turn(to) {
    page = to;
    draw();
    browser.scrollIntoView();
  }

  // ---- going from row to row --------------------------------------------------------------------------------

  function goTo(place, at = 0) {
    let position = order.indexOf(place);
    if (position < 0) {
      reset();
      position = order.indexOf(place);
    }
    if (Math.floor(position / PAGE) !== page || !rows.childElementCount) {
      page = Math.floor(position / PAGE);
      draw();
    }
    const element = rows.children[position - page * PAGE];
    const details = at ? element.querySelectorAll(".judgement")[at - 1] : null;
    if (details) details.open = true;
    const target = details ? details.querySelector("summary") : element;
    (details ? details.closest(".card") : element).scrollIntoView();
    target.focus({ preventScroll: true });
    history.replaceState(null, "", `#row-${data.rows[place].id}${details ? `/${at}` : ""}`);
  }

  function reset() {
    Object.assign(state, { find: "", system: -1, outcome: "", tokens: "", judged: "", sort: "row" });
    hidden.clear();
    search.value = "";
    for (const element of browser.querySelectorAll("select")) element.selectedIndex = 0;
    for (const element of browser.querySelectorAll(".shown input")) element.checked = true;
    update();
  }

  function followHash() {
    const found = /^#row-(\d+)(?:\/(\d+))?$/.exec(location.hash);
    const place = found ? data.rows.findIndex((row) => row.id === Number(found[1])) : -1;
    if (place >= 0) goTo(place, Number(found[2] ?? 0));
  }

  function step(by) {
    const current = document.activeElement?.closest?.(".row");
    const position = current ? page * PAGE + [...rows.children].indexOf(current) + by : page * PAGE;
    if (position >= 0 && position < order.length) goTo(order[position]);
  }

  // ---- a token's figures ------------------------------------------------------------------------------------

  const peek = make("div", { id: "peek", role: "tooltip", hidden: true });
  let shownFor = null;

  function influenceLine(value) {
    if (value === "outside") return ["+∞", "the proposal's own law excludes this token"];
    const times = Math.exp(Math.abs(value));
    const more = value > 0 ? "more" : "less";
    const said = times < 1.005 ? "as likely as by the proposal alone" : `${times.toPrecision(3)} times ${more} likely than by the proposal alone`;
    return [`${value > 0 ? "+" : ""}${number(value, 2)} nats`, said];
  }

  function show(span) {
    if (shownFor === span) return;
    hide();
    const { place, at, step } = span.dataset;
    const answer = data.rows[place].answers[at];
    const token = answer.tokens[step];
    const influence = answer.influence[step];
    const figures = make("dl");
    if (influence !== null) {
      const [value, meaning] = influenceLine(influence);
      figures.append(make("dt", {}, "influence"), make("dd", {}, make("b", {}, value), ` ${meaning}`));
    }
    figures.append(make("dt", {}, "KL(P_M‖Q)"), make("dd", {}, `${number(answer.kl[step])} nats`));
    figures.append(make("dt", {}, "event"), make("dd", {}, EVENTS[NAMES[answer.codes[step]]]));
    const withLaw = answer.candidates[step].some((candidate) => candidate[3] !== null);
    const head = make("tr", {}, make("th", { scope: "col" }, "candidate"));
    for (const title of ["P_M", "Q", ...(withLaw ? ["p"] : [])]) head.append(make("th", { scope: "col" }, title));
    const body = make("tbody");
    for (const [word, ...shares] of answer.candidates[step]) {
      const line = make("tr", {}, make("th", { scope: "row" }, make("bdi", {}, spelled(word))));
      for (const value of withLaw ? shares : shares.slice(0, 2)) {
        line.append(make("td", { class: value >= 0.5 ? "much" : value ? "" : "none" }, share(value)));
      }
      body.append(line);
    }
    const heading = make("p", { class: "token-name" }, make("bdi", {}, spelled(token) || "(part of a character)"));
    peek.replaceChildren(heading, figures, make("table", {}, make("thead", {}, head), body));
    peek.hidden = false;
    shownFor = span;
    span.setAttribute("aria-describedby", "peek");
    const box = span.getBoundingClientRect();
    const size = peek.getBoundingClientRect();
    const wide = document.documentElement.clientWidth;
    const below = box.bottom + 6 + size.height <= window.innerHeight;
    peek.style.left = `${Math.max(8, Math.min(box.left, wide - size.width - 8))}px`;
    peek.style.top = `${below ? box.bottom + 6 : Math.max(8, box.top - size.height - 6)}px`;
  }

  // White space in a candidate is drawn, or two of them could look alike.
  const spelled = (word) => word.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");

  function hide() {
    shownFor?.removeAttribute("aria-describedby");
    shownFor = null;
    peek.hidden = true;
  }

  function walk(span, by) {
    const all = [...span.parentElement.children];
    const next = all[Math.min(Math.max(all.indexOf(span) + by, 0), all.length - 1)];
    span.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  const tokenAt = (target) => target.closest?.(".token") ?? null;
  rows.addEventListener("pointerover", (event) => {
    const span = tokenAt(event.target);
    if (span) show(span);
  });
  rows.addEventListener("pointerout", (event) => {
    if (tokenAt(event.target) && document.activeElement !== shownFor) hide();
  });
  rows.addEventListener("focusin", (event) => {
    const span = tokenAt(event.target);
    if (span) show(span);
    else hide();
  });
  rows.addEventListener("focusout", hide);
  rows.addEventListener("click", (event) => {
    const span = tokenAt(event.target);
    if (span) show(span);
  });
  rows.addEventListener("toggle", hide, true);
  window.addEventListener("scroll", () => shownFor && document.activeElement !== shownFor && hide(), { passive: true });
  window.addEventListener("hashchange", followHash);

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.matches("input, select, textarea");
    const span = tokenAt(event.target);
    const moves = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
    if (event.key === "Escape") {
      hide();
      if (event.target === search) search.blur();
    } else if (span && event.key in moves) {
      event.preventDefault();
      walk(span, moves[event.key]);
    } else if (!typing && event.key === "/") {
      event.preventDefault();
      search.focus();
      search.select();
    } else if (!typing && (event.key === "j" || event.key === "k")) {
      step(event.key === "j" ? 1 : -1);
    }
  });

  let waiting = 0;
  search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      state.find = search.value;
      update();
    }, 120);
  });

  browser.append(
    make("p", { class: "small keys" }, "Keys: j and k go from row to row, / to the search, ← and → from token to token, Esc closes."),
    controls(), shownSystems(), make("div", { class: "bar" }, status, pager()), legend(), rows,
    make("div", { class: "bar" }, make("span"), pager()),
  );
  document.body.append(peek);
  draw();
  followHash();
})();

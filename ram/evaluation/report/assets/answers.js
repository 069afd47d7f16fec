// Draws a row: prompt, answers, judgements, the figures of a token. Models wrote the data, so strings go into text
// nodes only.
const drawing = (() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const NAMES = { a: "agreed", c: "changed", f: "fell_back" };
  const EVENTS = {
    agreed: "both models agreed",
    changed: "the aligner changed it",
    fell_back: "fell back to the proposal",
  };
  const OUTCOMES = { win: "win", tie: "tie", loss: "loss", failed: "not judged" };
  const systems = data.systems;

  // ---- small helpers ----------------------------------------------------------------------------------------

  // Replaces control characters, and characters that change the direction of a line, by visible ones.
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

  // A long name may be broken between its parts.
  const breakable = (name) => name.split(/(?<=\+)|(?=\[)/).flatMap((part) => [make("wbr"), part]).slice(1);
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
  // ---- cards ------------------------------------------------------------------------------------------------

  const STEPS = [0.1, 0.5, 1.5, 3]; // nats of influence at which the colour becomes deeper

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
    const parts = [plural(answer.n, "token")];
    if (answer.cut) parts.push("cut at the limit");
    if (answer.stats) {
      parts.push(`${answer.events.c} changed`, `${answer.events.f} fell back`, `KL ${number(answer.stats.kl, 2)}`);
      parts.push(`accepted ${number(answer.stats.acceptance, 2)}`);
    }
    return make("p", { class: "small" }, parts.join(" · "));
  }

  function judgement(answer, place, at) {
    const row = data.rows[place];
    const { judged } = answer;
    const list = make("dl");
    for (const [key, value] of Object.entries(judged)) {
      const label = key === "first" ? "first (preference for the answer shown first)" : key;
      const text = typeof value === "number" ? number(value, 4) : String(value);
      list.append(make("dt", {}, label), make("dd", {}, text));
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

  function rowElement(place, hidden) {
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

  // ---- a token's figures ------------------------------------------------------------------------------------

  const peek = make("div", { id: "peek", role: "tooltip", hidden: true });
  let shownFor = null;

  function influenceLine(value) {
    if (value === "outside") return ["+∞", "the proposal gives this token no probability"];
    const times = Math.exp(Math.abs(value));
    const more = value > 0 ? "more" : "less";
    const meaning = times < 1.005 ? "as likely as by the proposal alone" : `${times.toPrecision(3)} times ${more} likely than by the proposal alone`;
    return [`${value > 0 ? "+" : ""}${number(value, 2)} nats`, meaning];
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

  // Makes white space visible, because two candidates may differ only in it.
  const spelled = (word) => word.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");

  /** Hide the figures of a token; return whether there were any. */
  function hide() {
    const shown = !peek.hidden;
    shownFor?.removeAttribute("aria-describedby");
    shownFor = null;
    peek.hidden = true;
    return shown;
  }

  function walk(span, by) {
    const all = [...span.parentElement.children];
    const next = all[Math.min(Math.max(all.indexOf(span) + by, 0), all.length - 1)];
    span.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  const tokenAt = (target) => target.closest?.(".token") ?? null;

  // Shows the figures of the token under the pointer, of a tapped token, and of the token with the focus.
  function watch(rows) {
    const showAt = (event) => {
      const span = tokenAt(event.target);
      if (span) show(span);
      return span;
    };
    rows.addEventListener("pointerover", showAt);
    rows.addEventListener("click", showAt);
    rows.addEventListener("focusin", (event) => showAt(event) || hide());
    rows.addEventListener("focusout", hide);
    rows.addEventListener("toggle", hide, true);
    rows.addEventListener("pointerout", (event) => {
      if (tokenAt(event.target) && document.activeElement !== shownFor) hide();
    });
    rows.addEventListener("keydown", (event) => {
      const span = tokenAt(event.target);
      const moves = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
      if (!span || !(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      walk(span, moves[event.key]);
    });
    const scrolled = () => shownFor && document.activeElement !== shownFor && hide();
    window.addEventListener("scroll", scrolled, { passive: true });
    document.body.append(peek);
  }

  return { data, EVENTS, make, plural, outcome, written, rowElement, watch, hide };
})();

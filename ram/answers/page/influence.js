// The look of a token by the aligner's influence, and its figures under the pointer, a finger or the focus: for the
// report and for the server's page. Models wrote the data, so strings go into text nodes only.
const influence = (() => {
  "use strict";

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

  const number = (value, digits = 3) => (value == null ? "–" : value.toFixed(digits).replace("-", "−"));
  const share = (value) => (value === 0 ? "0" : value < 0.001 ? "<.001" : value.toFixed(3));
  // Makes white space visible, because two candidates may differ only in it.
  const spelled = (word) => word.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");

  // ---- the look of a token ----------------------------------------------------------------------------------

  const STEPS = [0.1, 0.5, 1.5, 3]; // nats of influence at which the colour becomes deeper

  function shade(influence) {
    if (influence === "outside") return "up4";
    const depth = STEPS.filter((step) => Math.abs(influence ?? 0) >= step).length;
    return depth ? `${influence > 0 ? "up" : "down"}${depth}` : "";
  }

  const blank = (text) => (text.includes("\n") && !text.trim() ? "newline" : "");

  function scale() {
    const line = make("p", {}, "Aligner's influence, log p − log P_M in nats: ");
    const steps = [["down4", "≤ −3"], ["down3", "−1.5"], ["down2", "−0.5"], ["down1", "−0.1"], ["", "0"]];
    steps.push(["up1", "0.1"], ["up2", "0.5"], ["up3", "1.5"], ["up4", "≥ 3"]);
    const swatches = steps.map(([mark, words]) => make("span", { class: `swatch ${mark}` }, words));
    line.append(make("span", { class: "swatches" }, ...swatches));
    return line;
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

  /** Show {token, influence, kl, candidates, event} beside a token's element; there may be no event. */
  function show(span, { token, influence, kl, candidates, event }) {
    if (shownFor === span) return;
    hide();
    const figures = make("dl");
    if (influence !== null) {
      const [value, meaning] = influenceLine(influence);
      figures.append(make("dt", {}, "influence"), make("dd", {}, make("b", {}, value), ` ${meaning}`));
    }
    figures.append(make("dt", {}, "KL(P_M‖Q)"), make("dd", {}, `${number(kl)} nats`));
    if (event) figures.append(make("dt", {}, "event"), make("dd", {}, event));
    const withLaw = candidates.some((candidate) => candidate[3] !== null);
    const head = make("tr", {}, make("th", { scope: "col" }, "candidate"));
    for (const title of ["P_M", "Q", ...(withLaw ? ["p"] : [])]) head.append(make("th", { scope: "col" }, title));
    const body = make("tbody");
    for (const [word, ...shares] of candidates) {
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

  /** Hide the figures of a token; return whether there were any. */
  function hide() {
    const shown = !peek.hidden;
    shownFor?.removeAttribute("aria-describedby");
    shownFor = null;
    peek.hidden = true;
    return shown;
  }

  function walk(span, by) {
    const all = [...span.parentElement.children].filter((other) => other.matches(".token"));
    const next = all[Math.min(Math.max(all.indexOf(span) + by, 0), all.length - 1)];
    span.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  const tokenAt = (target) => target.closest?.(".token") ?? null;

  // Shows the figures of the token under the pointer, of a tapped token, and of the token with the focus.
  function watch(root, figuresOf) {
    const showAt = (event) => {
      const span = tokenAt(event.target);
      if (span) show(span, figuresOf(span));
      return span;
    };
    root.addEventListener("pointerover", showAt);
    root.addEventListener("click", showAt);
    root.addEventListener("focusin", (event) => showAt(event) || hide());
    root.addEventListener("focusout", hide);
    root.addEventListener("toggle", hide, true);
    root.addEventListener("pointerout", (event) => {
      if (tokenAt(event.target) && document.activeElement !== shownFor) hide();
    });
    root.addEventListener("keydown", (event) => {
      const span = tokenAt(event.target);
      const moves = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
      if (!span || !(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      walk(span, moves[event.key]);
    });
    const scrolled = () => shownFor && document.activeElement !== shownFor && hide();
    window.addEventListener("scroll", scrolled, { passive: true, capture: true });
    document.body.append(peek);
  }

  return { make, visible, number, shade, blank, scale, watch, hide };
})();

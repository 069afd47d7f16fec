// The browser of answers: filters, order and pages of the rows, and moving between them.
(() => {
  "use strict";
  const { data, EVENTS, plural, outcome, written, rowElement, figuresOf } = drawing; // of answers.js
  const { make, scale, watch, hide } = influence; // of influence.js
  const PAGE = 10;
  const systems = data.systems;
  const pairs = systems.some((system) => system.pair);
  const says = (key) => data.rows.some((row) => row.answers.some((answer) => key in answer.judged));
  const detailed = data.rows.filter((row) => row.answers.some((answer) => answer.tokens)).length;
  const state = { find: "", system: -1, outcome: "", tokens: "", judged: "", texts: "", sort: "row" };
  const unfiltered = { ...state };
  const hidden = new Set();
  const haystacks = [];
  let waiting = 0; // timer of the search
  let order = data.rows.map((_, place) => place);
  let page = 0;

  // ---- filters and order ------------------------------------------------------------------------------------

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

  // Whether the pairs of a row do not all give one text; with a system chosen, whether another pair's text differs.
  function differ(row) {
    const texts = row.answers.filter((_, at) => systems[at].pair).map(written);
    const mine = systems[state.system]?.pair ? written(row.answers[state.system]) : texts[0];
    return texts.some((text) => text !== mine);
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
      if (state.texts && differ(row) !== (state.texts === "differ")) return;
      order.push(place);
    });
    const [, value, sign] = SORTS[state.sort];
    if (value) {
      // Of several systems the one with the first place counts; rows without a value come last.
      const keys = new Map();
      for (const place of order) {
        const values = of(data.rows[place]).map(value).filter((x) => Number.isFinite(x));
        keys.set(place, values.length ? Math.min(...values.map((x) => sign * x)) : Infinity);
      }
      order.sort((a, b) => (keys.get(a) === keys.get(b) ? a - b : keys.get(a) < keys.get(b) ? -1 : 1));
    }
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
    return make("label", { class: name }, make("span", {}, label), element);
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
    if (systems.filter((system) => system.pair).length > 1) {
      found.append(select("texts", "Texts of pairs", [["", "any"], ["differ", "differ"], ["same", "are the same"]]));
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
      const meant =
        `p is the pair's distribution, P_M the proposal's at its own settings. ${detailed} of ${plural(data.rows.length, "row")} ` +
        "have such figures: point at a token, tap it, or use ← and →.";
      found.append(scale(), make("p", {}, meant));
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
    rows.replaceChildren(...order.slice(page * PAGE, (page + 1) * PAGE).map((place) => rowElement(place, hidden)));
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

  // ---- moving between rows ----------------------------------------------------------------------------------

  function goTo(place, at = 0) {
    let position = order.indexOf(place);
    if (position < 0 || hidden.has(at - 1)) {
      reset();
      position = order.indexOf(place);
    }
    if (Math.floor(position / PAGE) !== page || !rows.childElementCount) {
      page = Math.floor(position / PAGE);
      draw();
    }
    const element = rows.children[position - page * PAGE];
    const details = at ? element.querySelector(`.judgement[data-at="${at - 1}"]`) : null;
    if (details) details.open = true;
    const target = details ? details.querySelector("summary") : element;
    (details ? details.closest(".card") : element).scrollIntoView();
    target.focus({ preventScroll: true });
    history.replaceState(null, "", `#row-${data.rows[place].id}${details ? `/${at}` : ""}`);
  }

  function reset() {
    Object.assign(state, unfiltered);
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

  watch(rows, figuresOf);
  window.addEventListener("hashchange", followHash);

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.matches("input, select, textarea");
    if (event.key === "Escape") {
      if (hide()) return; // first the figures of a token, then the filters
      clearTimeout(waiting);
      if (search.value || Object.keys(state).some((key) => state[key] !== unfiltered[key])) reset();
      if (typing) event.target.blur();
    } else if (!typing && event.key === "/") {
      event.preventDefault();
      search.focus();
      search.select();
    } else if (!typing && (event.key === "j" || event.key === "k")) {
      step(event.key === "j" ? 1 : -1);
    }
  });

  search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      state.find = search.value;
      update();
    }, 120);
  });

  browser.append(
    make("p", { class: "small keys" }, "Keys: j and k move between rows, ← and → between tokens, / goes to the search, Esc closes figures and clears the filters."),
    controls(), shownSystems(), make("div", { class: "bar" }, status, pager()), legend(), rows,
    make("div", { class: "bar" }, make("span"), pager()),
  );
  draw();
  followHash();
})();

// Draws a row: prompt, answers, judgements. Models wrote the data, so strings go into text nodes only.
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
  const { make, visible, number, shade, blank } = influence; // of influence.js
  const systems = data.systems;

  // A long name may be broken between its parts.
  const breakable = (name) => name.split(/(?<=\+)|(?=\[)/).flatMap((part) => [make("wbr"), part]).slice(1);
  const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

  function outcome(answer) {
    const { preference, failed } = answer.judged;
    if (failed !== undefined) return "failed";
    return preference > 0.5 ? "win" : preference < 0.5 ? "loss" : "tie";
  }

  // An answer's text, without the string or token that ended it. The tail counts characters, not UTF-16 units.
  function written(answer) {
    if (answer.text !== undefined) return answer.text;
    const whole = answer.tokens ? answer.tokens.join("") : answer.runs.map((run) => run[1]).join("");
    return answer.tail ? [...whole].slice(0, -answer.tail).join("") : whole;
  }

  // ---- cards ------------------------------------------------------------------------------------------------

  function words(answer, place, at) {
    const holder = make("p", { class: "words", dir: "auto" });
    if (answer.tokens) {
      const end = written(answer).length;
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
      const end = written(answer).length;
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
    return make("details", { class: "judgement", "data-at": at }, make("summary", {}, head), list, file, link);
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
    if (row.answers.some((answer) => answer.tokens)) title.append(make("span", { class: "small" }, " · with figures of its tokens"));
    const long = row.prompt.length > 300;
    const style = `words prompt${long ? " long" : ""}`;
    const prompt = make("p", { class: style, dir: "auto", tabindex: long ? "0" : null }, row.prompt);
    const cards = make("div", { class: "cards" });
    if (row.reference !== null) {
      const name = data.reference === "output" ? "Reference" : "In the test file";
      const text = make("p", { class: "words", dir: "auto" }, row.reference);
      const length = make("p", { class: "small" }, plural([...row.reference].length, "character"));
      cards.append(make("article", { class: "card given" }, make("h4", {}, name), text, length));
    }
    systems.forEach((_, at) => hidden.has(at) || cards.append(card(place, at)));
    const label = { id: `row-${row.id}`, class: "row", tabindex: "-1", "aria-label": `Row ${row.id}` };
    return make("section", label, title, prompt, cards);
  }

  function figuresOf(span) {
    const { place, at, step } = span.dataset;
    const answer = data.rows[place].answers[at];
    const { tokens, influence, kl, candidates, codes } = answer;
    return {
      token: tokens[step], influence: influence[step], kl: kl[step], candidates: candidates[step],
      event: EVENTS[NAMES[codes[step]]],
    };
  }

  return { data, EVENTS, plural, outcome, written, rowElement, figuresOf };
})();

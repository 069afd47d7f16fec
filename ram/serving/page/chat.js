// A dialogue with one of the server's models, or with two side by side. Text reaches the page as text alone.
"use strict";

const PROPOSAL = "proposal";
const MOST_TOKENS = 3000; // beyond that answers are shown without marks: comparing takes the product of both
const $ = (id) => document.getElementById(id);
let key = ""; // in this page's memory only
let turns = []; // {role, content}, as the next request sends them
let running = null; // the AbortController of what is being answered

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function say(text, failed = false) {
  $("status").textContent = text;
  $("status").classList.toggle("failed", failed);
}

class WantsKey extends Error {} // which the form for it says already

function complain(error) {
  if (!(error instanceof WantsKey)) say(error.message, true);
}

// ---- the server ---------------------------------------------------------------------------------------------

async function request(path, options = {}) {
  const sent = key, headers = { ...(options.headers || {}) };
  if (sent) headers.Authorization = `Bearer ${sent}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server cannot be reached");
  }
  if (response.ok) return response;
  if (response.status === 401) {
    if (sent === key) askForKey(); // else another one was given meanwhile, which this says nothing of
    throw new WantsKey(sent ? "this key is not the server's" : "this server wants a key");
  }
  let message = `the server answers ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* no JSON: the status says enough */ }
  throw new Error(message);
}

function askForKey() {
  $("wanted").textContent = key ? "This key is not the server's. Another one:" : "This server wants a key:";
  key = "";
  $("key-form").hidden = false;
  $("key").focus();
}

async function loadModels() {
  const listed = (await (await request("v1/models")).json()).data;
  $("key-form").hidden = true;
  const gone = [];
  for (const [id, first] of [["model", (each) => each.pair], ["other", (each) => !each.pair]]) {
    const select = $(id), before = select.value;
    select.replaceChildren(...listed.map((each) => {
      const option = element("option", "", each.id);
      option.value = each.id;
      return option;
    }));
    const kept = listed.find((each) => each.id === before);
    if (before && !kept) gone.push(before);
    select.value = (kept || listed.find(first) || listed[0]).id;
    select.disabled = false;
  }
  $("text").disabled = false;
  $("send").disabled = running !== null;
  say(gone.length ? `${gone[0]} is not served any more` : "");
}

// Aligners come and go: the lists are read again when somebody looks.
async function loadAgain() {
  if (running) return;
  try {
    const listed = (await (await request("v1/models")).json()).data.map((each) => each.id);
    const shown = Array.from($("model").options, (option) => option.value);
    if (listed.join("\n") !== shown.join("\n")) await loadModels();
  } catch (error) {
    complain(error);
  }
}

// What a request says beside the dialogue. The proposal alone knows no aligner's settings: so two answers part
// only where the aligner changes something.
function settings(model) {
  const found = {}, pair = model !== PROPOSAL;
  const fields = { tokens: "max_tokens", base_temperature: "base_temperature" };
  if (pair) Object.assign(fields, { temperature: "temperature", div_threshold: "div_threshold" });
  for (const [id, name] of Object.entries(fields)) {
    if ($(id).value !== "") found[name] = Number($(id).value);
  }
  if (pair && $("mode").value) found.sample_mode = $("mode").value;
  return found;
}

// Calls `hear` with every event of a stream; raises for one that tells an error, or where the end is missing.
async function stream(body, signal, hear) {
  const response = await request("v1/chat/completions", {
    method: "POST", signal, headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Error("the connection broke off");
    });
    if (done) throw new Error("the answer broke off");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      hear(chunk);
    }
  }
}

// ---- answers ------------------------------------------------------------------------------------------------

function facts(answer) {
  const told = [];
  if (answer.usage) told.push(`${answer.usage.completion_tokens} tokens`);
  if (answer.finish) told.push(answer.finish === "length" ? "cut at the limit" : "ended by itself");
  if (answer.pair && answer.stats) {
    told.push(`fell back ${Math.round(100 * answer.stats.fallback_fraction)} %`);
    told.push(`changed ${Math.round(100 * answer.stats.changed_fraction)} %`);
    if ("mean_kl" in answer.stats) told.push(`mean KL ${answer.stats.mean_kl.toPrecision(2)} nats`);
  }
  if (answer.seed !== undefined) told.push(`seed ${answer.seed}`);
  return told.map((each) => each.replaceAll(" ", "\u00a0")).join(" · "); // lines break between them
}

// One answer, shown while it grows; one that is to be compared comes with where its tokens begin.
async function answer(model, seed, box, signal, compared) {
  const card = element("section", "answer"), shown = element("p"), below = element("p", "facts");
  const grown = document.createTextNode(""); // grows by what is new: what a reader selected stays selected
  shown.append(grown);
  shown.dir = "auto";
  card.append(element("h2", "", model), shown, below);
  atEnd(() => box.append(card));
  const found = { text: "", starts: new Set(), shown, pair: model !== PROPOSAL };
  try {
    await stream({ model, messages: turns, seed, logprobs: compared, ...settings(model) }, signal, (chunk) => {
      found.seed = chunk.seed;
      if (chunk.usage) found.usage = chunk.usage;
      for (const choice of chunk.choices) {
        const more = choice.delta.content || "";
        found.text += more;
        for (const token of choice.logprobs ? choice.logprobs.content : []) found.starts.add(token.text_offset);
        atEnd(() => grown.appendData(more));
        if (choice.finish_reason) [found.finish, found.stats] = [choice.finish_reason, choice.stats];
      }
    });
    atEnd(() => below.textContent = facts(found));
  } catch (error) {
    found.failed = true;
    const stopped = error.name === "AbortError";
    below.classList.toggle("failed", !stopped);
    atEnd(() => below.textContent = stopped ? "stopped" : error.message);
  }
  return found;
}

// Lets the dialogue grow; who reads its end goes on reading there, who has scrolled up stays.
function atEnd(grow) {
  const box = $("dialogue"), low = box.scrollHeight - box.scrollTop - box.clientHeight < 48;
  grow();
  if (low) box.scrollTop = box.scrollHeight;
}

// The texts of an answer's tokens; those that only together make a character are one.
function tokens(answer) {
  const letters = Array.from(answer.text), starts = [...answer.starts].filter((at) => at < letters.length);
  return starts.map((at, i) => letters.slice(at, starts[i + 1]).join(""));
}

// Which tokens of two answers belong to no longest common subsequence: two arrays of [token, differs].
function differences(a, b) {
  if (a.length > MOST_TOKENS || b.length > MOST_TOKENS) return null;
  const best = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      best[i][j] = a[i] === b[j] ? best[i + 1][j + 1] + 1 : Math.max(best[i + 1][j], best[i][j + 1]);
    }
  }
  const left = a.map((token) => [token, true]), right = b.map((token) => [token, true]);
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (a[i] === b[j]) left[i++][1] = right[j++][1] = false;
    else if (best[i + 1][j] >= best[i][j + 1]) i++;
    else j++;
  }
  return [left, right];
}

// Marks what two answers do not share; gives a line that says what the marks mean.
function markChanges(answers) {
  if (answers[0].text === answers[1].text) return "both answers are the same";
  const sides = differences(...answers.map(tokens));
  if (!sides) return "these answers are too long to be compared token by token";
  answers.forEach((found, side) => found.shown.replaceChildren(...sides[side].map(([token, differs]) =>
    differs && token.trim() ? element("mark", "", token) : document.createTextNode(token))));
  return "marked: the tokens that the other answer has not";
}

// ---- the dialogue -------------------------------------------------------------------------------------------

function setRunning(controller) {
  running = controller;
  $("send").disabled = controller !== null;
  $("stop").disabled = controller === null;
}

// Whether the focus is nowhere, or on a button that is about to be disabled: then it may be put elsewhere.
const unfocused = () => [document.body, $("send"), $("stop")].includes(document.activeElement);

async function ask(text) {
  const models = [$("model").value], compared = $("compare").checked;
  if (compared && $("other").value !== models[0]) models.unshift($("other").value);
  // Two answers share their noise, so that they part only where the models do.
  const seed = $("seed").value !== "" ? Number($("seed").value) : crypto.getRandomValues(new Uint32Array(1))[0];
  document.querySelectorAll(".unanswered").forEach((each) => each.remove());
  const asked = turns, mine = new AbortController();
  turns.push({ role: "user", content: text });
  const said = element("div", "said", text), box = element("div", "answers");
  said.dir = "auto";
  box.setAttribute("aria-live", "polite");
  box.setAttribute("aria-busy", "true");
  $("hint").hidden = true;
  $("dialogue").append(said, box);
  $("dialogue").scrollTop = $("dialogue").scrollHeight;
  if (unfocused()) $("text").focus();
  setRunning(mine);
  say("answering …");
  const answers = await Promise.all(models.map((model) => answer(model, seed, box, mine.signal, models.length > 1)));
  if (asked !== turns) return; // forgotten meanwhile
  const last = answers[answers.length - 1]; // the chosen model's answer goes on in the dialogue
  if (last.failed && !last.text) {
    turns.pop();
    [said, box].forEach((each) => each.classList.add("unanswered"));
    if (!$("text").value) $("text").value = text; // to be sent again, or mended
  } else {
    turns.push({ role: "assistant", content: last.text });
  }
  atEnd(() => {
    if (answers.some((each) => each.failed)) say("");
    else if (answers.length === 2) say(markChanges(answers));
    else say(compared ? `${models[0]} is not compared with itself: choose another model` : "");
  });
  box.setAttribute("aria-busy", "false");
  const free = unfocused();
  setRunning(null);
  if (free) $("text").focus();
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text) return;
  if (running) return say("the answer is still being written; Esc stops it");
  $("text").value = "";
  ask(text);
});
$("text").addEventListener("keydown", (event) => {
  // 229: a method of input has the key, as when Enter takes one of its suggestions (Safari says only this).
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  if (!event.repeat) $("ask").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing && running) running.abort();
});
$("stop").addEventListener("click", () => running && running.abort());
$("reset").addEventListener("click", () => {
  if (running) {
    running.abort();
    setRunning(null);
  }
  turns = [];
  $("hint").hidden = false;
  $("dialogue").replaceChildren($("hint"));
  say("the dialogue is forgotten");
  $("text").focus();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!$("key").value.trim()) return;
  key = $("key").value.trim();
  $("key").value = "";
  loadModels().then(() => $("text").focus()).catch(complain);
});
for (const id of ["model", "other"]) $(id).addEventListener("focus", loadAgain);
loadModels().then(() => $("text").focus()).catch(complain);

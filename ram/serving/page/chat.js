// A dialogue with one of the server's models, or with two side by side. All text goes into text nodes.
"use strict";

const PROPOSAL = "proposal";
// An aligner changes next to nothing if fewer of its tokens were changed, or more fell back.
const LEAST_CHANGED = 0.01, MOST_FALLEN = 0.5;
const MOST_TOKENS = 3000; // longer answers are not compared: the time grows with the product of both lengths
const $ = (id) => document.getElementById(id);
let key = ""; // kept only in this page's memory
let turns = []; // messages of the next request: {role, content}
let running = null; // AbortController of the running answer
const figures = new WeakMap(); // token's element -> its figures, see influence.js

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function say(text, failed = false) {
  $("status").textContent = text;
  $("status").classList.toggle("failed", failed);
}

class KeyNeeded extends Error {} // not shown: the form for the key already says so

function showError(error) {
  if (!(error instanceof KeyNeeded)) say(error.message, true);
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
    if (sent === key) askForKey(); // otherwise the user has entered another key since
    throw new KeyNeeded(sent ? "this key is not the server's" : "this server needs a key");
  }
  let message = `the server answered with status ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* not JSON: show the status */ }
  throw new Error(message);
}

function askForKey() {
  $("key-label").textContent = key ? "This key is not the server's. Another one:" : "This server needs a key:";
  key = "";
  $("key-form").hidden = false;
  $("key").focus();
}

async function loadModels() {
  const listed = (await (await request("v1/models")).json()).data;
  $("key-form").hidden = true;
  const gone = [];
  for (const [id, first] of [["model", (model) => model.pair], ["other", (model) => !model.pair]]) {
    const select = $(id), before = select.value;
    select.replaceChildren(...listed.map((model) => {
      const option = element("option", "", model.id);
      option.value = model.id;
      return option;
    }));
    const kept = listed.find((model) => model.id === before);
    if (before && !kept) gone.push(before);
    select.value = (kept || listed.find(first) || listed[0]).id;
    select.disabled = false;
  }
  showDefaults(listed[0].defaults);
  $("text").disabled = false;
  $("send").disabled = running !== null;
  say(gone.length ? `${gone[0]} is not served any more` : "");
}

let defaultSeed = null; // the server's; null draws a new one

function showDefaults(defaults) {
  defaultSeed = defaults.seed;
  for (const [id, name] of Object.entries(FIELDS)) $(id).placeholder = String(defaults[name]);
  $("seed").placeholder = defaults.seed ?? "a new one";
  $("mode").options[0].textContent = `${defaults.sample_mode} (default)`;
}

// Aligners can be added and removed at any time: update the lists when they get the focus.
async function loadAgain() {
  if (running) return;
  try {
    const listed = (await (await request("v1/models")).json()).data.map((model) => model.id);
    const shown = Array.from($("model").options, (option) => option.value);
    if (listed.join("\n") !== shown.join("\n")) await loadModels();
  } catch (error) {
    showError(error);
  }
}

const FIELDS = {
  tokens: "max_tokens", base_temperature: "base_temperature", temperature: "temperature", div_threshold: "div_threshold",
};
const OF_PAIRS = ["temperature", "div_threshold"];

// The settings of a request. The proposal alone gets none of the aligner's, so that two answers differ only
// because of the aligner.
function settings(model) {
  const values = {}, pair = model !== PROPOSAL;
  for (const [id, name] of Object.entries(FIELDS)) {
    if ($(id).value !== "" && (pair || !OF_PAIRS.includes(id))) values[name] = Number($(id).value);
  }
  if (pair && $("mode").value) values.sample_mode = $("mode").value;
  return values;
}

// Calls `listen` with every chunk of a stream; throws if a chunk is an error, or the end is missing.
async function stream(body, signal, listen) {
  const response = await request("v1/chat/completions", {
    method: "POST", signal, headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Error("the connection was lost");
    });
    if (done) throw new Error("the answer is incomplete");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      listen(chunk);
    }
  }
}

// ---- answers ------------------------------------------------------------------------------------------------

function facts(answer) {
  const parts = [];
  if (answer.usage) parts.push(`${answer.usage.completion_tokens} tokens`);
  if (answer.finish) parts.push(answer.finish === "length" ? "cut at the limit" : "ended by itself");
  if (answer.pair && answer.stats) {
    parts.push(`fell back ${Math.round(100 * answer.stats.fallback_fraction)} %`);
    parts.push(`changed ${Math.round(100 * answer.stats.changed_fraction)} %`);
    if ("mean_kl" in answer.stats) parts.push(`mean KL ${answer.stats.mean_kl.toPrecision(2)} nats`);
  }
  if (answer.seed !== undefined) parts.push(`seed ${answer.seed}`);
  return parts.map((part) => part.replaceAll(" ", "\u00a0")).join(" · "); // lines break only between parts
}

// A line about a pair's answer if its aligner changed next to nothing of it.
function remark({ pair, stats, usage }) {
  if (!pair || !stats || !usage?.completion_tokens) return "";
  const { changed_fraction: changed, fallback_fraction: fallen } = stats, n = usage.completion_tokens;
  if (changed >= LEAST_CHANGED && fallen <= MOST_FALLEN) return "";
  const text = `The aligner changed ${Math.round(changed * n) || "none"} of the ${n} tokens`;
  if (!fallen) return `${text}.`;
  return `${text}, and ${Math.round(100 * fallen)} % of them fell back to the proposal: try the mode par.`;
}

// Shows one answer while it arrives. If it will be compared, the offsets of its tokens are requested too.
async function answer(model, seed, box, signal, compared) {
  const card = element("section", "answer"), shown = element("p"), below = element("p", "facts");
  const arrived = document.createTextNode(""); // only appended to, so that a selection stays
  shown.append(arrived);
  shown.dir = "auto";
  card.append(element("h2", "", model), shown, below);
  atEnd(() => box.append(card));
  const result = { text: "", starts: new Set(), ids: [], shown, pair: model !== PROPOSAL };
  const law = settings(model), body = { model, messages: turns, seed, logprobs: compared, ...law };
  try {
    await stream({ ...body, return_token_ids: result.pair }, signal, (chunk) => {
      result.seed = chunk.seed;
      if (chunk.prompt_token_ids) result.prompt = chunk.prompt_token_ids;
      if (chunk.usage) result.usage = chunk.usage;
      for (const choice of chunk.choices) {
        const more = choice.delta.content || "";
        result.text += more;
        result.ids.push(...(choice.token_ids || []));
        for (const token of choice.logprobs ? choice.logprobs.content : []) result.starts.add(token.text_offset);
        atEnd(() => arrived.appendData(more));
        if (choice.finish_reason) [result.finish, result.stats] = [choice.finish_reason, choice.stats];
      }
    });
    atEnd(() => {
      below.textContent = facts(result);
      if (remark(result)) card.append(element("p", "facts remark", remark(result)));
    });
    if (result.pair && result.ids.length) colour(result, model, law);
  } catch (error) {
    result.failed = true;
    const stopped = error.name === "AbortError";
    below.classList.toggle("failed", !stopped);
    atEnd(() => below.textContent = stopped ? "stopped" : error.message);
  }
  return result;
}

// Requests the aligner's influence on each token of a finished answer, and colours it.
async function colour(answer, model, { max_tokens, ...law }) {
  const body = JSON.stringify({ model, prompt: answer.prompt, tokens: answer.ids, ...law });
  try {
    const headers = { "Content-Type": "application/json" };
    answer.influence = await (await request("influence", { method: "POST", headers, body })).json();
  } catch {
    return; // the answer stays as it is
  }
  if (!answer.shown.isConnected) return; // the dialogue was reset meanwhile
  if (!answer.influence.tokens.join("").startsWith(answer.text)) return;
  paint(answer);
  if (!$("scale").childElementCount) {
    $("scale").append(influence.scale());
    $("scale").append(element("p", "", "Point at a token, tap it, or use ← and → to see both models' candidates."));
  }
  atEnd(() => $("scale").hidden = false);
}

// Shows a finished answer token by token, with marks on those that the other answer does not have.
function paint(answer) {
  const pieces = answer.pieces || [[answer.text, false]];
  if (!answer.influence) {
    answer.shown.replaceChildren(...pieces.map(([token, differs]) =>
      differs && token.trim() ? element("mark", "", token) : document.createTextNode(token)));
    return;
  }
  const marked = new Set();
  let at = 0;
  for (const [token, differs] of pieces) {
    if (differs && token.trim()) marked.add(at);
    at += token.length;
  }
  const { tokens, influence: values, kl, candidates } = answer.influence;
  at = 0;
  const shown = [];
  tokens.forEach((token, step) => {
    const text = token.slice(0, Math.max(answer.text.length - at, 0)); // without the string that ended the answer
    if (text) {
      const look = ["token", influence.shade(values[step]), influence.blank(text)].filter(Boolean).join(" ");
      const node = element(marked.has(at) ? "mark" : "span", look, text);
      node.tabIndex = shown.length ? -1 : 0;
      figures.set(node, { token, influence: values[step], kl: kl[step], candidates: candidates[step] });
      shown.push(node);
    }
    at += token.length;
  });
  answer.shown.replaceChildren(...shown);
}

// Runs a change that makes the dialogue longer, and keeps its end in view unless the user has scrolled up.
function atEnd(grow) {
  const box = $("dialogue"), low = box.scrollHeight - box.scrollTop - box.clientHeight < 48;
  grow();
  if (low) box.scrollTop = box.scrollHeight;
}

// The texts of an answer's tokens; tokens that make up one character count as one.
function tokens(answer) {
  const letters = Array.from(answer.text), starts = [...answer.starts].filter((at) => at < letters.length);
  return starts.map((at, i) => letters.slice(at, starts[i + 1]).join(""));
}

// Two arrays of [token, differs], by the longest common subsequence of two answers; null if they are too long.
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

// Marks the tokens that two answers do not share; returns a line that explains the marks.
function markChanges(answers) {
  if (answers[0].text === answers[1].text) return "both answers are the same";
  const sides = differences(...answers.map(tokens));
  if (!sides) return "these answers are too long to be compared token by token";
  answers.forEach((answer, side) => {
    answer.pieces = sides[side];
    paint(answer);
  });
  return "marked: tokens that the other answer does not have";
}

// ---- the dialogue -------------------------------------------------------------------------------------------

function setRunning(controller) {
  running = controller;
  $("send").disabled = controller !== null;
  $("stop").disabled = controller === null;
}

// Whether the focus may be moved: it is on nothing, or on a button that is about to be disabled.
const unfocused = () => [document.body, $("send"), $("stop")].includes(document.activeElement);

async function ask(text) {
  const models = [$("model").value], compared = $("compare").checked;
  if (compared && $("other").value !== models[0]) models.unshift($("other").value);
  // Both answers get the same random numbers, so that they differ only if the models do.
  const given = $("seed").value !== "" ? Number($("seed").value) : defaultSeed;
  const seed = given ?? crypto.getRandomValues(new Uint32Array(1))[0];
  document.querySelectorAll(".unanswered").forEach((node) => node.remove());
  const dialogue = turns, controller = new AbortController();
  turns.push({ role: "user", content: text });
  const question = element("div", "said", text), box = element("div", "answers");
  question.dir = "auto";
  box.setAttribute("aria-live", "polite");
  box.setAttribute("aria-busy", "true");
  $("hint").hidden = true;
  $("dialogue").append(question, box);
  $("dialogue").scrollTop = $("dialogue").scrollHeight;
  if (unfocused()) $("text").focus();
  setRunning(controller);
  say("answering …");
  const answers = await Promise.all(models.map((model) => answer(model, seed, box, controller.signal, models.length > 1)));
  if (dialogue !== turns) return; // the user has reset the dialogue
  const last = answers[answers.length - 1]; // the chosen model's answer becomes part of the dialogue
  if (last.failed && !last.text) {
    turns.pop();
    [question, box].forEach((node) => node.classList.add("unanswered"));
    if (!$("text").value) $("text").value = text; // to be corrected and sent again
  } else {
    turns.push({ role: "assistant", content: last.text });
  }
  atEnd(() => {
    if (answers.some((answer) => answer.failed)) say("");
    else if (answers.length === 2) say(markChanges(answers));
    else say(compared ? `${models[0]} is not compared with itself: choose another model` : "");
  });
  box.setAttribute("aria-busy", "false");
  const movable = unfocused();
  setRunning(null);
  if (movable) $("text").focus();
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text) return;
  if (running) return say("the answer is still being written; Esc stops it");
  // Such a field has no value, and the request would silently have the default.
  const unread = ["seed", ...Object.keys(FIELDS)].map($).find((field) => field.validity.badInput);
  if (unread) return say(`${unread.labels[0]?.textContent.trim() ?? unread.id}: expected a number`, true);
  $("text").value = "";
  ask(text);
});
$("text").addEventListener("keydown", (event) => {
  // 229: an input method handles the key, for example Enter for one of its suggestions (all that Safari reports).
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  if (!event.repeat) $("ask").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing) return;
  if (!influence.hide() && running) running.abort();
});
$("stop").addEventListener("click", () => running && running.abort());
$("reset").addEventListener("click", () => {
  if (running) {
    running.abort();
    setRunning(null);
  }
  turns = [];
  $("scale").hidden = true;
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
  loadModels().then(() => $("text").focus()).catch(showError);
});
influence.watch($("dialogue"), (node) => figures.get(node));
for (const id of ["model", "other"]) $(id).addEventListener("focus", loadAgain);
loadModels().then(() => $("text").focus()).catch(showError);

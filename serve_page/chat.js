// A dialogue with one of the server's models, or with two side by side. Text reaches the page as text alone.
"use strict";

const PROPOSAL = "proposal";
const MOST_WORDS = 1500; // beyond that answers are shown without marks: comparing takes the product of both
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

async function loadModels(focused = true) {
  const listed = (await (await request("v1/models")).json()).data;
  $("key-form").hidden = true;
  for (const [id, first] of [["model", (each) => each.pair], ["other", (each) => !each.pair]]) {
    const select = $(id), before = select.value;
    select.replaceChildren(...listed.map((each) => {
      const option = element("option", "", each.id);
      option.value = each.id;
      return option;
    }));
    const kept = listed.find((each) => each.id === before) || listed.find(first) || listed[0];
    select.value = kept.id;
    select.disabled = false;
  }
  $("text").disabled = $("send").disabled = false;
  if (focused) $("text").focus();
  say("");
}

function settings() {
  const found = {};
  for (const [id, name] of [["tokens", "max_tokens"], ["temperature", "temperature"], ["div_threshold", "div_threshold"]]) {
    if ($(id).value !== "") found[name] = Number($(id).value);
  }
  if ($("mode").value) found.sample_mode = $("mode").value;
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
    const { done, value } = await reader.read();
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

function facts(answer) {
  const told = [];
  if (answer.usage) told.push(`${answer.usage.completion_tokens} tokens`);
  if (answer.finish) told.push(answer.finish === "length" ? "cut at the limit" : "ended by itself");
  if (answer.pair && answer.stats) {
    told.push(`fell back ${Math.round(100 * answer.stats.fallback_fraction)} %`);
    if ("changed_fraction" in answer.stats) told.push(`changed ${Math.round(100 * answer.stats.changed_fraction)} %`);
  }
  if (answer.seed !== undefined) told.push(`seed ${answer.seed}`);
  return told.join(" · ");
}

// One answer, shown while it grows.
async function answer(model, seed, box, signal) {
  const card = element("section", "answer"), text = element("p"), below = element("p", "facts");
  card.append(element("h2", "", model), text, below);
  box.append(card);
  const found = { model, text: "", shown: text, pair: model !== PROPOSAL };
  try {
    await stream({ model, messages: turns, ...settings(), ...(seed === null ? {} : { seed }) }, signal, (chunk) => {
      found.seed = chunk.seed;
      if (chunk.usage) found.usage = chunk.usage;
      for (const choice of chunk.choices) {
        found.text += choice.delta.content || "";
        if (choice.finish_reason) [found.finish, found.stats] = [choice.finish_reason, choice.stats];
      }
      text.textContent = found.text;
      follow();
    });
    below.textContent = facts(found);
  } catch (error) {
    found.failed = error;
    below.textContent = error.name === "AbortError" ? "stopped" : error.message;
    below.classList.toggle("failed", error.name !== "AbortError");
  }
  return found;
}

function follow() {
  const box = $("dialogue");
  if (box.scrollHeight - box.scrollTop - box.clientHeight < 160) box.scrollTop = box.scrollHeight;
}

// Which words of two texts belong to no longest common subsequence: two arrays of [word, differs].
function differences(first, second) {
  const a = first.match(/\s+|\S+/g) || [], b = second.match(/\s+|\S+/g) || [];
  if (a.length > MOST_WORDS || b.length > MOST_WORDS) return null;
  const best = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      best[i][j] = a[i] === b[j] ? best[i + 1][j + 1] + 1 : Math.max(best[i + 1][j], best[i][j + 1]);
    }
  }
  const left = a.map((word) => [word, true]), right = b.map((word) => [word, true]);
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (a[i] === b[j]) left[i++][1] = right[j++][1] = false;
    else if (best[i + 1][j] >= best[i][j + 1]) i++;
    else j++;
  }
  return [left, right];
}

function markChanges(answers) {
  const words = differences(answers[0].text, answers[1].text);
  if (!words) return;
  answers.forEach((found, side) => found.shown.replaceChildren(...words[side].map(([word, differs]) =>
    differs && word.trim() ? element("mark", "", word) : document.createTextNode(word))));
}

async function ask(text) {
  const models = [$("model").value];
  if ($("compare").checked && $("other").value !== models[0]) models.unshift($("other").value);
  // Two answers share their noise, so that they part only where the models do.
  const seed = $("seed").value !== "" ? Number($("seed").value) : crypto.getRandomValues(new Uint32Array(1))[0];
  turns.push({ role: "user", content: text });
  const box = element("div", "answers");
  box.setAttribute("aria-live", "polite");
  box.setAttribute("aria-busy", "true");
  $("dialogue").append(element("div", "said", text), box);
  running = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  say("answering …");
  const asked = turns;
  const answers = await Promise.all(models.map((model) => answer(model, seed, box, running.signal)));
  running = null;
  $("send").disabled = false;
  $("stop").disabled = true;
  say("");
  if (answers.length === 2 && !answers.some((each) => each.failed)) markChanges(answers);
  box.setAttribute("aria-busy", "false");
  const last = answers[answers.length - 1]; // the chosen model's answer goes on in the dialogue
  if (asked === turns) {
    if (last.failed && !last.text) turns.pop();
    else turns.push({ role: "assistant", content: last.text });
  }
  follow();
  $("text").focus();
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || running) return;
  $("text").value = "";
  ask(text);
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("stop").addEventListener("click", () => running && running.abort());
$("reset").addEventListener("click", () => {
  if (running) running.abort();
  turns = [];
  $("dialogue").replaceChildren();
  say("the dialogue is forgotten");
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  $("key").value = "";
  loadModels().catch(complain);
});
$("model").addEventListener("focus", () => loadQuietly());
loadModels().catch(complain);

// Aligners come and go: the lists are read again when somebody looks, without stealing the focus.
async function loadQuietly() {
  if (running) return;
  try {
    const listed = (await (await request("v1/models")).json()).data.map((each) => each.id);
    const shown = Array.from($("model").options, (option) => option.value);
    if (listed.join("\n") !== shown.join("\n")) await loadModels(false);
  } catch (error) {
    say(error.message, true);
  }
}

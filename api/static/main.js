// The page: what happens between a question and its answer. What things look like is in the other modules.

import { connectCode, showCode } from "./code.js";
import { byId, show } from "./dom.js";
import { Key } from "./key.js";
import { acceptFiles, Tray } from "./media.js";
import { chatBody } from "./request.js";
import { offerSamples } from "./samples.js";
import { Failure, readModel, readState, streamChat } from "./server.js";
import { Settings } from "./settings.js";
import { Turn } from "./turn.js";

const POLL_SECONDS = { ready: 30, other: 2 };
const QUANTISATIONS = { bfloat16: "unquantised", wint8: "8-bit weights", wint4: "4-bit experts" };

const settings = new Settings(), key = new Key(), tray = new Tray();
const message = byId("message"), scroller = byId("scroller");
let turns = [];
let model = null; // its card, once the server showed it
let isLocked = false; // it wants a key that nobody has given yet
let running = null; // AbortController of the answer that is coming in
let follows = true; // the end of the conversation is in view, and stays there as it grows

// asking ----------------------------------------------------------------------------------------

async function send() {
  const text = message.value.trim();
  if (running || (!text && tray.isEmpty)) return;
  const media = tray.take();
  message.value = "";
  const answered = askNew(text, media);
  fit(); // after the stop button has taken the focus over: a button that is disabled loses it
  await answered;
}

async function askNew(text, media) {
  const turn = new Turn(turns.length + 1, { text, media }, { retry: askAgain, showCode: showTurnCode });
  turns.push(turn);
  byId("turns").append(turn.element);
  show(byId("welcome"), false);
  show(byId("new-chat"), true);
  follow();
  if (!byId("composer").contains(document.activeElement)) rest();
  await run(turn);
}

function askAgain(turn) {
  if (!running) run(turn);
}

async function askSample(text, files) {
  tray.add(files);
  if (!running) await askNew(text, tray.take());
}

/** Ask for the answer to `turn`, on top of the finished turns before it, and show it as it comes. */
async function run(turn) {
  running = new AbortController();
  drawRunning();
  const before = turns.slice(0, turns.indexOf(turn)).filter((earlier) => earlier.counts);
  announce("Waiting for the answer.");
  turn.wait();
  let failure = null;
  try {
    await Promise.all(turn.question.media.map((attachment) => attachment.ready));
    turn.begin(chatBody(model?.id, before, turn.question, settings.fields));
    await receive(turn);
  } catch (error) {
    failure = error;
  }
  running = null;
  drawRunning();
  const failed = failure && handleFailure(turn, failure);
  if (follows) follow();
  await failed; // it may be asking for a key
}

async function receive(turn) {
  let reason = null;
  const body = { ...turn.body, stream_options: { include_usage: true, continuous_usage_stats: true } };
  for await (const chunk of streamChat(body, key.value, running.signal)) {
    turn.add(chunk);
    reason = chunk.finish ?? reason;
  }
  turn.finish(reason);
  announce(turn.content || "The answer is empty.");
}

async function handleFailure(turn, failure) {
  if (failure.name === "AbortError") {
    turn.stop();
    announce("Stopped.");
    return;
  }
  if (!(failure instanceof Failure)) console.error(failure); // a mistake of this page
  turn.fail(failure.message);
  announce(failure.message);
  if (failure.needsKey && (await key.ask())) {
    connect();
    await run(turn);
    return;
  }
  if (!failure.status || failure.status === 503) watch();
}

function stop() {
  running?.abort();
}

function newChat() {
  stop();
  for (const turn of turns) turn.close();
  turns = [];
  show(byId("welcome"), true);
  show(byId("new-chat"), false);
  rest();
}

function showTurnCode(turn) {
  showCode(turn.body, turns.flatMap((earlier) => earlier.question.media), key.value !== "");
}

// the server ------------------------------------------------------------------------------------

/** Learn what the server has, asking for a key where it wants one. */
async function connect() {
  try {
    model = await readModel(key.value);
  } catch (error) {
    if (!error.needsKey) return;
    isLocked = true;
    if (await key.ask()) await connect();
    return;
  }
  isLocked = false;
  drawModel();
}

let timer = 0;

/** Show how the server is now, and look again later: often until it is ready. */
async function watch() {
  clearTimeout(timer);
  const { status, detail } = await readState();
  const isReady = status === "ready";
  byId("state").dataset.state = status;
  if (isReady && !model && !isLocked) await connect();
  if (!isReady) byId("model").textContent = inWords(status, detail);
  else if (isLocked) byId("model").textContent = "Needs an API key";
  else drawModel();
  timer = setTimeout(watch, 1000 * (isReady ? POLL_SECONDS.ready : POLL_SECONDS.other));
}

function inWords(status, detail) {
  if (status === "unreachable") return "The server does not answer";
  const what = status === "starting" ? "Starting" : status[0].toUpperCase() + status.slice(1);
  return detail ? `${what}: ${detail}` : what;
}

function drawModel() {
  byId("model").textContent = model?.id ?? "Octet";
  byId("facts").textContent = model
    ? `${contextOf(model)} context · ${QUANTISATIONS[model.quantization] ?? model.quantization}`
    : "";
  byId("facts").title = model ? `${model.max_model_len} tokens for question and answer together` : "";
  const canSee = model?.modalities?.includes("image") ?? true;
  show(byId("attach"), canSee);
  if (!canSee) offerSamples(askSample, (problem) => tray.say(problem), canSee);
}

/** Most contexts are powers of two; 131072 says less than 128K. */
function contextOf({ max_model_len: tokens }) {
  return tokens % 1024 ? tokens.toLocaleString("en") : `${tokens / 1024}K`;
}

// the page --------------------------------------------------------------------------------------

function announce(text) {
  byId("announcer").textContent = text;
}

function drawRunning() {
  const hadFocus = [byId("send"), byId("stop")].includes(document.activeElement);
  show(byId("send"), !running);
  show(byId("stop"), running !== null);
  if (hadFocus) (running ? byId("stop") : message).focus();
}

/** As many lines as the text has; style.css sets the most. */
function fit() {
  message.style.height = "auto";
  message.style.height = `${message.scrollHeight}px`;
  byId("send").disabled = message.value.trim() === "" && tray.isEmpty;
}

function follow() {
  follows = true;
  scroller.scrollTop = scroller.scrollHeight;
  show(byId("to-end"), false);
}

/** Put the focus where the next thing happens; on a phone not into the text, its keyboard would cover the page. */
function rest() {
  (hasKeyboard() ? message : scroller).focus({ preventScroll: true });
}

function hasKeyboard() {
  return matchMedia("(any-pointer: fine)").matches;
}

function noticeScroll() {
  follows = !turns.length || scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 40;
  show(byId("to-end"), !follows);
}

function onKey(event) {
  if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) {
    event.preventDefault();
    stop();
  }
}

function onMessageKey(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // isComposing: choosing a character
  event.preventDefault();
  send();
}

function start() {
  settings.connect();
  connectCode();
  acceptFiles(tray, () => {
    fit();
    message.focus();
  });
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  byId("stop").addEventListener("click", stop);
  byId("new-chat").addEventListener("click", newChat);
  byId("to-end").addEventListener("click", follow);
  byId("tray").addEventListener("click", fit);
  message.addEventListener("input", fit);
  message.addEventListener("keydown", onMessageKey);
  document.addEventListener("keydown", onKey);
  scroller.addEventListener("scroll", noticeScroll, { passive: true });
  new ResizeObserver(() => running && follows && follow()).observe(byId("turns")); // texts and pictures come in
  window.addEventListener("online", watch);
  offerSamples(askSample, (problem) => tray.say(problem), true);
  if (hasKeyboard()) message.focus();
  fit();
  watch();
}

start();

// The cards of the first screen: pictures and clips of ours with a question each; a click asks it.

import { byId, make } from "./dom.js";

const FOLDER = "static/samples/";

/**
 * Fill the list. `ask(text, files)` is called with what a card shows, `complain(sentence)` when it cannot be
 * had. `canSee`: the model takes pictures.
 */
export async function offerSamples(ask, complain, canSee) {
  const samples = await fetch(`${FOLDER}samples.json`).then((response) => response.json(), () => []);
  const offered = samples.filter((sample) => canSee || !sample.files.length);
  byId("samples").replaceChildren(...offered.map((sample) => card(sample, ask, complain)));
}

function card(sample, ask, complain) {
  const pictures = make("span", { className: "pictures" }, ...sample.files.map(thumbnail));
  const label = make("span", { className: "label", lang: /[\u4e00-\u9fff]/.test(sample.question) ? "zh" : "en" },
    sample.question);
  const button = make("button", { type: "button", className: "card" }, pictures, label);
  button.addEventListener("click", async () => {
    button.disabled = true;
    const files = await Promise.all(sample.files.map(download)).catch(() => null);
    button.disabled = false;
    if (files) await ask(sample.question, files);
    else complain("The sample could not be fetched. Check that the server is running.");
  });
  const clip = pictures.querySelector("video");
  if (clip) playOnInterest(button, clip);
  return make("li", {}, button);
}

function thumbnail(name) {
  if (!name.endsWith(".mp4")) return make("img", { src: FOLDER + name, alt: "" });
  const clip = make("video", { muted: true, loop: true, playsInline: true, preload: "auto" });
  const draw = (file) => { clip.src = `${URL.createObjectURL(file)}#t=0.8`; }; // in memory it can seek
  download(name).then(draw, () => {});
  return clip;
}

function playOnInterest(button, clip) {
  const play = () => clip.play().catch(() => {}); // a browser may refuse; the still picture is enough
  for (const event of ["pointerenter", "focus"]) button.addEventListener(event, play);
  for (const event of ["pointerleave", "blur"]) button.addEventListener(event, () => clip.pause());
}

async function download(name) {
  const blob = await (await fetch(FOLDER + name)).blob();
  return new File([blob], name, { type: blob.type });
}

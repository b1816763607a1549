// The page: progress, a form, streamed answers, a benchmark. window.edgewright is the model, for scripts of your own.
import { open } from "./edgewright.js";

const at = (id) => document.getElementById(id);
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
let stopping = null, memory = null;

/** Offline from the second visit on; where the host does not isolate the page, the service worker does, after one reload. */
async function serveOffline() {
  if (!("serviceWorker" in navigator)) return;
  await navigator.serviceWorker.register("./sw.js");
  const before = navigator.serviceWorker.controller;
  await navigator.serviceWorker.ready;
  if (!crossOriginIsolated && !before && !sessionStorage.getItem("edgewright-reloaded")) {
    sessionStorage.setItem("edgewright-reloaded", "1");
    location.reload();
    await new Promise(() => {});
  }
}

function failed(error) {
  at("status").textContent = error.message;
  at("status").classList.add("bad");
  at("bar").style.width = "0";
}

function turn(question) {
  const box = document.createElement("div");
  box.className = "turn";
  for (const name of ["asked", "said", "note quiet"]) box.append(Object.assign(document.createElement("div"), { className: name }));
  const [asked, said, note] = box.children;
  asked.textContent = question;
  said.classList.add("writing");
  at("answers").append(box);
  return { said, note };
}

async function contextOf(model) {
  const text = at("context")?.value.trim();
  if (!text) return null;
  if (memory?.text !== text) memory = { text, of: await model.readContext(text) };
  return memory.of;
}

async function ask(model) {
  const question = at("prompt").value || at("prompt").placeholder;
  const { said, note } = turn(question);
  at("send").hidden = !(at("stop").hidden = false);
  stopping = new AbortController();
  try {
    const sampling = { temperature: Number(at("temperature").value), top_p: Number(at("top_p").value) };
    const options = { sampling, maxNewTokens: Number(at("most").value), memory: await contextOf(model), signal: stopping.signal };
    const show = (piece) => {
      said.textContent += piece;
      said.scrollIntoView({ block: "nearest" });
    };
    const answer = await model.answer(question, { ...options, onText: show });
    const rate = answer.tokens.length > 1 ? `, ${((1000 * (answer.tokens.length - 1)) / answer.ms).toFixed(1)} tokens/s` : "";
    note.textContent = `${answer.tokens.length} tokens${rate}; first after ${answer.firstMs.toFixed(0)} ms; ended by: ${answer.ending}`;
    at("prompt").value = "";
  } catch (error) {
    note.textContent = error.message;
    note.classList.add("bad");
  }
  said.classList.remove("writing");
  at("send").hidden = !(at("stop").hidden = true);
}

const kept = [];

/** How alike two vectors are, as the model's makers compare them; the more, the more alike. */
function similarity(a, b, kind) {
  const dot = (x, y) => x.reduce((sum, value, i) => sum + value * y[i], 0);
  if (kind === "dot") return dot(a, b);
  if (kind === "cosine") return dot(a, b) / Math.max(1e-30, Math.sqrt(dot(a, a) * dot(b, b)));
  const apart = a.map((value, i) => value - b[i]);
  return -(kind === "manhattan" ? apart.reduce((sum, value) => sum + Math.abs(value), 0) : Math.sqrt(dot(apart, apart)));
}

/** Of a model of embeddings: how alike a text is to those before it. */
async function compare(model) {
  const text = at("prompt").value || at("prompt").placeholder;
  const { said, note } = turn(text);
  at("send").disabled = true;
  try {
    const began = performance.now();
    const vector = await model.embed(text);
    const kind = model.info.embedding.similarity;
    const others = kept.map((other) => ({ text: other.text, like: similarity(vector, other.vector, kind) })).sort((a, b) => b.like - a.like);
    said.textContent = others.length
      ? others.map(({ text: other, like }) => `${like.toFixed(3)}  ${other}`).join("\n")
      : "The first text. What you write next is compared with it.";
    note.textContent = `${vector.length} numbers in ${(performance.now() - began).toFixed(0)} ms; by ${kind}`;
    kept.push({ text, vector });
    at("prompt").value = "";
  } catch (error) {
    note.textContent = error.message;
    note.classList.add("bad");
  }
  said.classList.remove("writing");
  at("send").disabled = false;
}

async function bench(model) {
  const body = at("rows").tBodies[0];
  body.replaceChildren();
  at("rows").hidden = false;
  at("bench").disabled = true;
  const onRow = ({ test, tokensPerSecond, std }) => {
    const row = body.insertRow();
    for (const text of [test, tokensPerSecond.toFixed(1), std.toFixed(1)]) row.insertCell().textContent = text;
  };
  await model.bench({ onRow }).catch((error) => (at("checked").textContent = error.message));
  at("bench").disabled = false;
}

async function check(model) {
  at("checked").textContent = "checking";
  const { cases, texts, wrong } = await model.checkTraces().catch((error) => ({ wrong: [error.message] }));
  at("checked").textContent = wrong.length ? wrong.join("; ") : `all ${cases} traces and ${texts} texts as the bundle answers them`;
  at("checked").classList.toggle("bad", wrong.length > 0);
}

async function start() {
  await serveOffline().catch(() => {}); // such as in a private window: then there is no offline, and one thread
  const onProgress = ({ name, loaded, total, cached }) => {
    at("bar").style.width = `${(100 * loaded) / total}%`;
    at("status").textContent = `${cached ? "from this device" : "fetching"}: ${name}, ${megabytes(loaded)} of ${megabytes(total)}`;
  };
  const model = await open({ onProgress, onStep: (step) => (at("status").textContent = step) });
  at("loading").hidden = true;
  at("how").textContent = `WebAssembly, ${model.threads} thread${model.threads > 1 ? "s" : ""}.`;
  for (const id of ["send", "bench", "check"]) at(id).disabled = false;
  at("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!model.busy) (model.info.embedding ? compare : ask)(model);
  });
  at("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      at("ask").requestSubmit();
    }
  });
  at("stop").addEventListener("click", () => stopping?.abort());
  at("bench").addEventListener("click", () => bench(model));
  at("check").addEventListener("click", () => check(model));
  return model;
}

// Scripts may call generate at once: it waits for the model.
const ready = start();
ready.catch(failed);
const later = (name) => async (...given) => (await ready)[name](...given);
window.edgewright = Object.fromEntries(["generate", "answer", "embed", "readContext", "checkTraces", "bench"].map((name) => [name, later(name)]));
window.edgewright.ready = ready;

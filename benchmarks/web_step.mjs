// CPU time of a decode step in WebAssembly: a site's model as it is shipped, beside the bundle's own graphs of MatMulNBits.
//   node web_step.mjs MODULES SITE BUNDLE [ROUNDS]     prints JSON; both in turn, one thread, after 300 steps of each
// MODULES: an absolute node_modules folder. SITE: what `embed --platform web` made of BUNDLE.
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [modules, site, bundle, rounds = "9"] = process.argv.slice(2);
const found = createRequire(`${modules}/`).resolve("onnxruntime-web");
const ort = await import(pathToFileURL(found.replace(/\.js$/, ".mjs")));
const { Runtime } = await import(pathToFileURL(`${site}/runtime.js`));
ort.env.wasm.numThreads = 1;

async function opened(form) {
  const app = JSON.parse(await readFile(`${site}/model/app.json`, "utf8"));
  const files = {};
  for (const name of Object.keys(app.files)) files[name] = new Uint8Array(await readFile(`${site}/model/${name}`));
  app.tokenizer = null;
  if (form === "codes") {
    app.expanded = null;
    for (const { file } of app.graphs) files[file] = new Uint8Array(await readFile(`${bundle}/onnx/${file}`));
  }
  const began = process.cpuUsage();
  const runtime = await Runtime.open(app, files, ort, null);
  return { runtime, openMs: spent(began) };
}

function spent(began) {
  const { user, system } = process.cpuUsage(began);
  return (user + system) / 1000;
}

async function step({ runtime }) {
  const { app } = runtime, count = Math.min(32, app.max_context - 3), token = Math.floor(app.vocab / 2);
  const stream = await runtime.start([token], count + 1);
  await stream.prefill();
  const began = process.cpuUsage();
  for (let i = 0; i < count; i++) await stream.feed(token);
  return spent(began) / count;
}

const median = (values) => values.sort((a, b) => a - b)[Math.floor(values.length / 2)];
const forms = { codes: await opened("codes"), expanded: await opened("expanded") };
for (let i = 0; i < 10; i++) for (const form of Object.values(forms)) await step(form);
const times = { codes: [], expanded: [] }, ratios = [];
for (let i = 0; i < Number(rounds); i++) {
  for (const name of Object.keys(forms)) times[name].push(await step(forms[name]));
  ratios.push(times.codes.at(-1) / times.expanded.at(-1));
}
const report = { ratio: median(ratios), least: Math.min(...ratios), most: Math.max(...ratios) };
for (const name of Object.keys(forms)) report[name] = { stepMs: median(times[name]), openMs: forms[name].openMs };
console.log(JSON.stringify(report));

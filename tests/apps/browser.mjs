// A site in headless Chromium, for test_web.py: node browser.mjs MODULES CHROMIUM URL, the job as JSON on standard input.
// Prints JSON: answers and pieces of the prompts, what the traces say, isolation, console errors, answers offline.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";

const [modules, executablePath, url] = process.argv.slice(2);
const { chromium } = createRequire(`${modules}/`)("playwright-core");
const job = JSON.parse(readFileSync(0, "utf8"));
const flags = ["--no-sandbox", "--disable-quic", "--disable-background-networking", "--disable-dev-shm-usage"];
const browser = await chromium.launch({ executablePath, args: flags });
const context = await browser.newContext({ viewport: job.viewport ?? { width: 1100, height: 800 }, colorScheme: job.scheme ?? "light" });
const page = await context.newPage();
page.setDefaultTimeout(240_000);
const errors = [];
page.on("console", (message) => ["error", "warning"].includes(message.type()) && errors.push(message.text()));
page.on("pageerror", (error) => errors.push(String(error)));
const result = { answers: [], errors };

const ask = ([prompt, options]) =>
  page.evaluate(
    async ([text, given]) => {
      const pieces = [];
      const said = await window.edgewright.generate(text, { ...given, onText: (piece) => pieces.push(piece) });
      return { said, pieces };
    },
    [prompt, options ?? {}],
  );
const settled = () => page.waitForFunction(() => document.getElementById("loading").hidden || document.querySelector("#status.bad"));

await page.goto(url);
await settled();
result.status = await page.evaluate(() => (document.querySelector("#status.bad") ? document.getElementById("status").textContent : null));
if (result.status === null) {
  await page.evaluate(() => navigator.serviceWorker.ready.then(() => {}));
  result.isolated = await page.evaluate(() => crossOriginIsolated);
  result.how = await page.textContent("#how");
  for (const one of job.prompts ?? []) result.answers.push(await ask(one));
  if (job.traces) result.traces = await page.evaluate(() => window.edgewright.checkTraces());
  if (job.script) result.script = await page.evaluate(job.script);
  if (job.form) {
    await page.fill("#prompt", job.form);
    await page.press("#prompt", "Enter");
    await page.waitForFunction(() => document.querySelector(".said:not(.writing)")?.textContent);
    result.form = await page.textContent(".said");
    await page.waitForFunction(() => document.querySelector(".turn .note").textContent);
  }
  if (job.shot) await page.screenshot({ path: job.shot, fullPage: true });
  if (job.offline) {
    await context.setOffline(true);
    await page.reload();
    await settled();
    result.offline = await ask(job.offline).then(
      ({ said }) => said,
      (error) => `refused: ${error.message}`,
    );
  }
}
await browser.close();
console.log(JSON.stringify(result));

// The answer of a site in a real browser: node answer_in_browser.mjs EDGEWRIGHT NODE_MODULES CHROMIUM SITE PROMPT
// Serves the site by `edgewright preview`, opens it in headless Chromium, and prints what its page answers.
import { spawn } from "node:child_process";
import { once } from "node:events";
import { createRequire } from "node:module";
import { resolve } from "node:path";
import { createInterface } from "node:readline";

const [edgewright, modules, executablePath, site, prompt] = process.argv.slice(2);
const { chromium } = createRequire(`${resolve(modules)}/`)("playwright-core");

const server = spawn(edgewright, ["preview", site, "--port", "0"], { stdio: ["ignore", "ignore", "pipe"] });
try {
  const [line] = await once(createInterface({ input: server.stderr }), "line");
  const address = /http:\S+/.exec(line)?.[0];
  if (address === undefined) throw new Error(line);
  const args = ["--no-sandbox", "--disable-quic", "--disable-background-networking", "--disable-dev-shm-usage"];
  const browser = await chromium.launch({ executablePath, args });
  try {
    const page = await browser.newPage();
    page.setDefaultTimeout(240_000);
    await page.goto(address);
    await page.waitForFunction(() => document.getElementById("loading").hidden || document.querySelector("#status.bad"));
    const answer = await page.evaluate((text) => window.edgewright.generate(text), prompt);
    console.log(`Chromium ${browser.version()}: ${prompt} -> ${answer}`);
  } finally {
    await browser.close();
  }
} finally {
  server.kill();
}

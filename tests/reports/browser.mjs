// A page in headless Chromium, for test_page_browser.py: node browser.mjs MODULES CHROMIUM FILE FOLDER.
// Prints JSON: for each of desk and phone, light and dark, what the page looks like there; console lines, requests, a PDF's pages.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [modules, executablePath, file, folder] = process.argv.slice(2);
const { chromium } = createRequire(`${modules}/`)("playwright-core");
const flags = ["--no-sandbox", "--disable-background-networking", "--disable-dev-shm-usage"];
const browser = await chromium.launch({ executablePath, args: flags });
const said = [], asked = [], looks = {};
for (const [size, width, height] of [["desk", 1280, 800], ["phone", 390, 844]]) {
  for (const colorScheme of ["light", "dark"]) {
    const context = await browser.newContext({ viewport: { width, height }, colorScheme });
    const page = await context.newPage();
    page.on("console", (message) => said.push(message.text()));
    page.on("pageerror", (error) => said.push(String(error)));
    page.on("request", (request) => asked.push(request.url()));
    await page.goto(pathToFileURL(file).href);
    const look = await page.evaluate(() => ({
      overflow: document.documentElement.scrollWidth - innerWidth,
      background: getComputedStyle(document.body).backgroundColor,
      sections: [...document.querySelectorAll("section")].filter((s) => s.getBoundingClientRect().height > 40).map((s) => s.id),
      outside: [...document.querySelectorAll(".dot")].filter((dot) => {
        const own = dot.getBoundingClientRect(), room = (dot.closest(".area") ?? dot.closest(".rail")).getBoundingClientRect();
        return own.left < room.left - 12 || own.right > room.right + 12 || own.top < room.top - 12 || own.bottom > room.bottom + 12;
      }).length,
      squeezed: [...document.querySelectorAll(".name, td, th, .value")].filter((text) => text.offsetHeight > 5 * text.offsetWidth && text.offsetHeight > 60).length,
      dots: document.querySelectorAll(".dot").length,
    }));
    await page.locator("[data-tip]").first().focus();
    look.tip = await page.textContent("#tip");
    await page.click("#theme");
    look.turned = await page.evaluate(() => getComputedStyle(document.body).backgroundColor);
    await page.screenshot({ path: `${folder}/${size}-${colorScheme}.png`, fullPage: true });
    if (size === "desk" && colorScheme === "dark") {
      await page.pdf({ path: `${folder}/page.pdf`, format: "A4" });
      look.pdf = readFileSync(`${folder}/page.pdf`).length;
      await page.emulateMedia({ media: "print", colorScheme: "dark" });
      look.printed = await page.evaluate(() => getComputedStyle(document.body).backgroundColor);
    }
    looks[`${size} ${colorScheme}`] = look;
    await context.close();
  }
}
await browser.close();
console.log(JSON.stringify({ said, asked, looks }));

/** What the tests and the measurement share: a plain web server for folders, and the browser. */

import { createReadStream, existsSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { extname, join, normalize, sep } from "node:path";
import { fileURLToPath } from "node:url";

import { chromium } from "playwright-core";

export const DIST = fileURLToPath(new URL("../dist", import.meta.url));

const TYPES = {
  ".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".json": "application/json", ".mjs": "text/javascript",
  ".svg": "image/svg+xml", ".wasm": "application/wasm",
};

/** Headers that let a page use threads. */
export const ISOLATING = { "cross-origin-opener-policy": "same-origin", "cross-origin-embedder-policy": "require-corp" };

/** Serve `folders`, by the first part of the path, and `dist/` for everything else; returns the address and `close`. */
export async function serve(folders = {}, headers = {}) {
  const server = createServer((request, response) => {
    const path = decodeURIComponent(new URL(request.url, "http://x").pathname);
    const [, first, ...rest] = path.split("/");
    const [root, inside] = first in folders ? [folders[first], rest.join("/")] : [DIST, path];
    const place = normalize(join(root, inside.endsWith("/") || inside === "" ? `${inside}index.html` : inside));
    if (!place.startsWith(root + sep) || !existsSync(place) || !statSync(place).isFile()) {
      response.writeHead(404).end();
      return;
    }
    response.writeHead(200, { "content-type": TYPES[extname(place)] ?? "application/octet-stream", ...headers });
    createReadStream(place).pipe(response);
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  return {
    url: `http://127.0.0.1:${server.address().port}/`,
    close: () => new Promise((resolve) => { server.close(resolve); server.closeAllConnections(); }),
  };
}

/** The path of a Chromium, or undefined. */
export function findChromium() {
  const places = [process.env.CHROMIUM, "/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"];
  return places.find((place) => place && existsSync(place));
}

/** Chromium without a window; `webgpu` gives it a WebGPU adapter in software (SwiftShader). */
export function launch({ webgpu = false } = {}) {
  const quiet = [
    "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
  ];
  const graphics = webgpu ? ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"] : ["--disable-gpu"];
  return chromium.launch({ executablePath: findChromium(), args: ["--no-sandbox", ...quiet, ...graphics] });
}

/** A page, and what it says that it should not: console errors, exceptions, requests to other places. */
export async function watchedPage(browser, url, options = {}) {
  const context = await browser.newContext(options);
  const page = await context.newPage();
  const problems = [];
  page.on("console", (message) => {
    if (message.type() === "error" || message.type() === "warning") problems.push(`console: ${message.text()}`);
  });
  page.on("pageerror", (error) => problems.push(`exception: ${error}`));
  page.on("request", (request) => {
    if (!request.url().startsWith(url) && !/^(blob|data):/.test(request.url())) problems.push(`asks for ${request.url()}`);
  });
  return { context, page, problems };
}

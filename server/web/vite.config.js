// Builds the page into dist/, where the server finds it. dist/sources.sha256 says what it was built from;
// tests/server/test_page.py computes the same and fails when the built files are older than their sources.
import { createHash } from "node:crypto";
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { defineConfig } from "vite";

const SINGLE = ["index.html", "package-lock.json", "package.json", "vite.config.js"];

function digest() {
  const names = [...SINGLE, ...readdirSync("src").map((name) => `src/${name}`)].sort();
  const hash = createHash("sha256");
  for (const name of names) hash.update(`${name}\0`).update(readFileSync(name)).update("\0");
  return hash.digest("hex");
}

const saysItsSources = { name: "says-its-sources", closeBundle: () => writeFileSync("dist/sources.sha256", digest() + "\n") };

export default defineConfig({
  base: "/",
  oxc: { jsx: { runtime: "automatic", importSource: "preact" } },
  plugins: [saysItsSources],
  build: {
    target: "es2022",
    assetsInlineLimit: 0, // the content security policy has no room for data: scripts or styles
    modulePreload: { polyfill: false },
    license: { fileName: "licenses.md" }, // what the bundle contains of other people's work
    rollupOptions: {
      output: {
        entryFileNames: "assets/[name].js",
        chunkFileNames: "assets/[name].js",
        assetFileNames: "assets/[name][extname]",
      },
    },
  },
});

import { defineConfig } from "vite";

// Two headers that let WebAssembly use several threads; a page without them runs on one thread.
const headers = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
};

export default defineConfig({
  base: "./", // dist/ works at any path
  appType: "mpa", // a missing file is 404, not the page
  server: { headers },
  preview: { headers },
  worker: { format: "es" },
  optimizeDeps: { exclude: ["onnxruntime-web"] }, // it finds its .wasm beside itself
  build: {
    target: "es2023",
    chunkSizeWarningLimit: 1000,
    modulePreload: { polyfill: false },
    rolldownOptions: {
      input: { index: "index.html", api: "api.html", "mmd-sampler": "src/mmd-sampler.ts" },
      preserveEntrySignatures: "strict",
      output: {
        entryFileNames: (chunk) => (chunk.name === "mmd-sampler" ? "mmd-sampler.js" : "assets/[name]-[hash].js"),
      },
    },
  },
});

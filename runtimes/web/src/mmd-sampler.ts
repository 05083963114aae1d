/** Everything for another page: `<mmd-sampler bundle="bundle/">`, and the functions behind it. */

import { SamplerElement } from "./element.js";

export type { OpenOptions } from "./client.js";
export { BrowserSampler, openBundle } from "./client.js";
export type { Chain, Manifest, SampleOptions, Seed, SelfTest, Tensor, Tensors } from "./core/index.js";
export { BundleError, classLabels, KitError, normal, NotAvailableError, picture, report, UsageError } from "./core/index.js";
export { paint } from "./paint.js";
export { SamplerElement };

customElements.define("mmd-sampler", SamplerElement);

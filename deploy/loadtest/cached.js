// What people ask again and again: most must come from the cache.
import { embed, popularTexts, steady, thresholds } from './lib.js';

export const options = {
  scenarios: { cached: steady('5m') },
  thresholds: { ...thresholds, cached_inputs: [`rate>${__ENV.CACHED || 0.5}`] },
};

export default function () {
  embed(popularTexts());
}

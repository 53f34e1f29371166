// Hours at RATE: watch the memory of every process on the dashboard meanwhile.
import { embed, newTexts, popularTexts, steady, thresholds } from './lib.js';

export const options = { scenarios: { soak: steady('2h') }, thresholds };

export default function () {
  embed(Math.random() < 0.5 ? newTexts() : popularTexts());
}

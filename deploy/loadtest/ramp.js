// Where the limit is: from nothing to five times RATE. The p99 that is exceeded first tells; so does the queue on the dashboard.
import { RATE, embed, newTexts, stages, thresholds } from './lib.js';

const step = __ENV.DURATION || '2m';

export const options = {
  scenarios: { ramp: stages([[step, RATE], [step, 2 * RATE], [step, 3 * RATE], [step, 4 * RATE], [step, 5 * RATE]]) },
  thresholds,
};

export default function () {
  embed(newTexts());
}

// Signs in with a real browser and prints, for each page, what axe-core finds; then what the forms led to.
//   node look.mjs CHROMIUM AUTHORIZE_URL CONNECTIONS_URL KEY [PICTURES]
import { createRequire } from 'node:module';
import { readFileSync } from 'node:fs';

// Packages are looked up where the program runs, not where this file is.
const require = createRequire(process.cwd() + '/');
const { chromium } = require('playwright-core');
const axe = readFileSync(require.resolve('axe-core/axe.min.js'), 'utf8');
const [program, authorize, connections, key, pictures] = process.argv.slice(2);

const RULES = ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice'];
const browser = await chromium.launch({ executablePath: program, args: ['--no-sandbox'] });
const print = (line) => console.log(JSON.stringify(line));

async function look(page, name) {
  for (const colorScheme of ['light', 'dark']) {
    await page.emulateMedia({ colorScheme });
    // Evaluated by the debugger, which the policy of the page does not bind.
    if (colorScheme === 'light') await page.evaluate(axe);
    const rules = colorScheme === 'light' ? RULES : ['color-contrast'];
    const { violations } = await page.evaluate((wanted) => axe.run({ runOnly: wanted }), rules);
    const width = await page.evaluate(() => document.documentElement.scrollWidth);
    if (pictures) await page.screenshot({ path: `${pictures}/${name}-${colorScheme}.png`, fullPage: true });
    print({
      page: name, colorScheme, width, lang: await page.getAttribute('html', 'lang'),
      found: violations.map((one) => `${one.id}: ${one.nodes.map((node) => node.html).join(' ')}`),
    });
  }
}

// 320 CSS pixels: no page scrolls sideways there (WCAG 1.4.10).
const context = await browser.newContext({ viewport: { width: 320, height: 700 }, locale: 'ko-KR' });
const page = await context.newPage();
const blocked = [];
page.on('console', (message) => message.type() === 'error' && blocked.push(message.text()));
await page.route('https://acme.example/**', (route) => route.fulfill({ status: 200, body: 'back at the client' }));

await page.goto(authorize);
await look(page, 'login');
await page.fill('input[name=key]', 'kp_live_wrong');
await page.keyboard.press('Enter');
await page.waitForSelector('[role=alert]');
await look(page, 'failed-login');
await page.fill('input[name=key]', key);
await page.keyboard.press('Enter');
await page.waitForSelector('button[value=allow]');
await look(page, 'consent');
const sizes = await page.$$eval('button', (buttons) => buttons.map((one) => {
  const { width, height } = one.getBoundingClientRect();
  const { color, backgroundColor, borderColor, fontWeight } = getComputedStyle(one);
  return { width: Math.round(width), height, color, backgroundColor, borderColor, fontWeight };
}));
print({ buttons: sizes });
await page.click('button[value=allow]');
await page.waitForURL('https://acme.example/**');
print({ arrived: page.url() });

await page.goto(connections);
await page.fill('input[name=key]', key);
await page.keyboard.press('Enter');
await page.waitForSelector('button[value=all]');
await look(page, 'connections');
await page.click('button[value=all]');
await page.waitForSelector('[role=status]');
await page.goto(authorize.replace('client_id=', 'client_id=unknown'));
await look(page, 'error');
print({ blocked });
await browser.close();

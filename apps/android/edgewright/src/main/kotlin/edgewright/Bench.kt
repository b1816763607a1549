package edgewright

import java.util.Locale
import kotlin.math.sqrt

/** Tokens a second of a test such as pp512 or tg128: mean and standard deviation over the repeats. */
class BenchRow(val test: String, val tokensPerSecond: Double, val deviation: Double, val repeats: Int) {
    override fun toString() = String.format(Locale.ROOT, "| %s | %.2f ± %.2f |", test, tokensPerSecond, deviation)
}

/** pp: reading tokens of a prompt. tg: generating tokens behind a prompt of one. The first run of each does not count. */
class Bench(private val model: Model, private val pp: Int = 512, private val tg: Int = 128, private val repeats: Int = 5) {
    fun run(each: (BenchRow) -> Unit) {
        if (pp < 1 || tg < 1 || repeats < 1) fail("pp $pp, tg $tg, repeats $repeats: each is 1 or more")
        val most = model.app.maxContext - 1
        val reading = pp.coerceAtMost(most)
        val writing = tg.coerceAtMost(most - 1)
        val token = model.app.vocab / 2
        each(row("pp$reading", reading) { seconds { model.start(IntArray(reading) { token }, 1).use { it.prefill() } } })
        each(
            row("tg$writing", writing) {
                model.start(intArrayOf(token), writing + 1).use { stream ->
                    stream.prefill()
                    seconds { repeat(writing) { stream.feed(token) } }
                }
            },
        )
    }

    private fun row(test: String, tokens: Int, once: () -> Double): BenchRow {
        once()
        val rates = List(repeats) { tokens / once() }
        val mean = rates.average()
        return BenchRow(test, mean, sqrt(rates.sumOf { (it - mean) * (it - mean) } / repeats), repeats)
    }

    private inline fun seconds(act: () -> Unit): Double {
        val began = System.nanoTime()
        act()
        return (System.nanoTime() - began) / 1e9
    }
}

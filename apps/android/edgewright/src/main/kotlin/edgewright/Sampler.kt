package edgewright

import java.nio.FloatBuffer
import java.util.Random
import kotlin.math.exp

/** Penalties, then temperature, top-k, top-p, min-p: in this order, as transformers does. */
internal class Sampler(private val how: Sampling) {
    private val random = how.seed?.let(::Random) ?: Random()
    private val plain = how.temperature == 0.0 && how.repetitionPenalty == 1.0 && how.noRepeatNgram == 0

    init {
        val means = how.temperature >= 0 && how.topP > 0 && how.topP <= 1 && how.minP in 0.0..1.0 && how.repetitionPenalty > 0
        if (!means || how.topK < 0 || how.noRepeatNgram < 0) {
            fail(
                "the sampling means nothing: temperature from 0, topP above 0 up to 1, minP from 0 to 1, repetitionPenalty above 0, " +
                    "topK and noRepeatNgram from 0",
            )
        }
    }

    /** seen: all tokens that the decoder has read or written. */
    fun pick(given: FloatBuffer, seen: () -> IntArray): Int {
        if (plain) return best(given)
        val logits = DoubleArray(given.capacity()) { given[it].toDouble() }
        penalize(logits, seen())
        return if (how.temperature == 0.0) best(logits) else draw(logits)
    }

    private fun penalize(logits: DoubleArray, seen: IntArray) {
        if (how.repetitionPenalty != 1.0) {
            for (token in seen.toSet()) {
                val logit = logits[token]
                logits[token] = if (logit < 0) logit * how.repetitionPenalty else logit / how.repetitionPenalty
            }
        }
        val n = how.noRepeatNgram
        if (n == 0 || seen.size + 1 < n) return
        val ending = seen.size - (n - 1)
        for (i in 0..seen.size - n) {
            if ((0 until n - 1).all { seen[i + it] == seen[ending + it] }) logits[seen[i + n - 1]] = Double.NEGATIVE_INFINITY
        }
    }

    private fun draw(logits: DoubleArray): Int {
        for (i in logits.indices) logits[i] /= how.temperature
        val order = logits.indices.sortedByDescending { logits[it] }
        if (how.topK in 1 until order.size) {
            val least = logits[order[how.topK - 1]]
            for (i in logits.indices) if (logits[i] < least) logits[i] = Double.NEGATIVE_INFINITY
        }
        if (how.topP < 1) {
            val chances = softmax(logits)
            var before = 0.0
            for (i in order) {
                if (before >= how.topP) logits[i] = Double.NEGATIVE_INFINITY
                before += chances[i]
            }
        }
        val chances = softmax(logits)
        val floor = how.minP * chances.max()
        val kept = order.filter { chances[it] > 0 && chances[it] >= floor }
        var left = random.nextDouble() * kept.sumOf { chances[it] }
        return kept.firstOrNull {
            left -= chances[it]
            left < 0
        } ?: kept.last()
    }

    private fun softmax(logits: DoubleArray): DoubleArray {
        val most = logits.max()
        val powers = DoubleArray(logits.size) { exp(logits[it] - most) }
        val sum = powers.sum()
        return DoubleArray(logits.size) { powers[it] / sum }
    }

    companion object {
        fun best(logits: FloatBuffer): Int {
            var best = 0
            for (i in 1 until logits.capacity()) if (logits[i] > logits[best]) best = i
            return best
        }

        private fun best(logits: DoubleArray): Int = logits.indices.maxBy { logits[it] }
    }
}

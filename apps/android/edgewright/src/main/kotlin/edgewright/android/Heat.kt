package edgewright.android

import android.content.Context
import android.os.Build
import android.os.PowerManager
import kotlinx.coroutines.channels.awaitClose
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.callbackFlow
import kotlinx.coroutines.flow.flowOf

/** How hot the phone is; from SEVERE on it is slowed down, and an app had better wait. */
enum class Heat { NONE, LIGHT, MODERATE, SEVERE, CRITICAL, EMERGENCY, SHUTDOWN }

/** The heat now, and each change of it. Android tells it from version 10 on; NONE before. */
fun heat(context: Context): Flow<Heat> {
    if (Build.VERSION.SDK_INT < Build.VERSION_CODES.Q) return flowOf(Heat.NONE)
    val power = context.getSystemService(PowerManager::class.java)
    return callbackFlow {
        val listener = PowerManager.OnThermalStatusChangedListener { status -> trySend(heatOf(status)) }
        trySend(heatOf(power.currentThermalStatus))
        power.addThermalStatusListener(listener)
        awaitClose { power.removeThermalStatusListener(listener) }
    }
}

private fun heatOf(status: Int) = Heat.entries.getOrElse(status) { Heat.NONE }
